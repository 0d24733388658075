"""One vLLM engine and what belongs to it once, however many front ends send it requests."""

from __future__ import annotations

import asyncio
import os
from argparse import Namespace
from typing import TYPE_CHECKING, Any, NoReturn

from serve_app.cluster import placement
from serve_app.config import engine_args
from serve_app.config.settings import ModelConfig
from serve_app.errors import UserError
from serve_app.replica import gang
from serve_app.replica.load import EngineLoad

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


def parse_args(config: ModelConfig, ids: list[str], rank: dict[str, Any]) -> Namespace:
    """The namespace that `vllm serve` would have, read by vLLM's own parser.

    Raises:
        UserError: vLLM refuses the arguments; its own sentence.
    """
    if os.environ.get("VLLM_API_KEY"):  # vLLM would refuse what the gateway sends
        raise UserError(f"unset VLLM_API_KEY: {engine_args.OWNED['api_key']}")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    engine = {**placement.of(config).engine_defaults, **config.engine, **rank}
    if config.adapters:
        engine.setdefault("enable_lora", True)
    argv = ["--model", config.model, "--served-model-name", *ids]

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ValueError(" ".join(message.split()))  # argparse would print and exit

    parser = make_arg_parser(Parser())
    try:
        args: Namespace = parser.parse_args(argv + engine_args.to_argv(engine))
        validate_parsed_serve_args(args)
        if args.tool_parser_plugin:
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        validate_api_server_args(args)
    except (TypeError, ValueError, KeyError) as error:
        # A KeyError's text is the repr of its argument, quotes and all.
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(f"vLLM refuses the engine arguments: {text}") from None
    return args


class Engine:
    """An AsyncLLM, its load, and whether it sleeps. :meth:`stop` ends it."""

    def __init__(self, llm: AsyncLLM, load: EngineLoad) -> None:
        self.llm = llm
        self.load = load
        self.asleep = False
        """Whether it has been put to sleep, or is on its way there."""

        self.sleep_lock = asyncio.Lock()
        """Held while it is put to sleep or woken."""

    @classmethod
    def start(cls, args: Namespace) -> Engine:
        """Load the model. Blocks the event loop, which must be the one that will use the engine.

        Args:
            args: of :func:`parse_args`.
        """
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.loggers import PrometheusStatLogger
        from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

        from serve_app.replica.executor import executor_class

        given = AsyncEngineArgs.from_cli_args(args)
        vllm_config = given.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        load = EngineLoad(args.served_model_name[0])
        llm = AsyncLLM(
            vllm_config,
            executor_class=executor_class(vllm_config, gang.member()),
            usage_context=UsageContext.OPENAI_API_SERVER,
            # Ray's logger exports vLLM's metrics to Prometheus; vLLM's own one keeps /metrics.
            stat_loggers=[load.attach, RayPrometheusStatLogger, PrometheusStatLogger],
            log_requests=given.enable_log_requests,
            log_stats=not given.disable_log_stats,
            aggregate_engine_logging=given.aggregate_engine_logging,
        )
        return cls(llm, load)

    @property
    def dead(self) -> bool:
        """Whether the engine's processes have ended by themselves. They do not come back."""
        return bool(self.llm.errored)

    @property
    def busy(self) -> bool:
        """Whether the engine has requests, so that it should be making steps."""
        return bool(self.llm.output_processor.has_unfinished_requests())

    async def stop(self) -> None:
        """End the engine's processes."""
        await asyncio.to_thread(self.llm.shutdown, 0)
