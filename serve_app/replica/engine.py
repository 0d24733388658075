"""A vLLM engine: its arguments, its start, and how a further process joins it."""

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
from serve_app.replica.clients import Client, announced
from serve_app.replica.load import EngineLoad
from serve_app.replica.recorder import Recorder

if TYPE_CHECKING:
    from vllm.config import VllmConfig
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


def configure(args: Namespace, front_ends: int) -> VllmConfig:
    """The engine's configuration as vLLM makes it of :func:`parse_args`'s namespace."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    given = AsyncEngineArgs.from_cli_args(args)
    # With several, vLLM keeps no cache of media that one front end and the engine would share.
    given._api_process_count = front_ends
    return given.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


class Engine:
    """A vLLM engine as one process sees it: its AsyncLLM there, and whether it sleeps."""

    def __init__(self, llm: AsyncLLM) -> None:
        self.llm = llm
        self.asleep = False
        """Whether it has been put to sleep, or is on its way there."""

        self.cache_drops = 0
        """How often its prefix cache was dropped."""

        self.wakes = False
        """Whether it then wakes by itself when requests wait for it: it is in a swap group."""

    @classmethod
    def start(
        cls, args: Namespace, config: VllmConfig, load: EngineLoad, others: list[Client]
    ) -> Engine:
        """Load the model. Blocks the event loop, which must be the one that will use the engine.

        Args:
            args, config: of :func:`parse_args` and :func:`configure`.
            others: the engine's clients besides this one, spares included.
        """
        from vllm.v1.metrics.loggers import LoggingStatLogger, PrometheusStatLogger
        from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

        from serve_app.replica.executor import executor_class

        # Ray's logger exports vLLM's metrics to Prometheus; vLLM's own one keeps /metrics.
        loggers = [load.attach, RayPrometheusStatLogger, PrometheusStatLogger]
        if others and not args.disable_log_stats:
            # vLLM has none beside other clients. Here it sees the statistics of them all.
            loggers.append(LoggingStatLogger)
        with announced(others):
            llm = _async_llm(
                args, config, executor_class(config, gang.member()), loggers,
                client_count=config.parallel_config._api_process_count,
            )  # fmt: skip
        return cls(llm)

    @classmethod
    def join(
        cls, args: Namespace, config: VllmConfig, client: Client, recorder: Recorder
    ) -> Engine:
        """Become one more client of an engine that another process starts. Blocks until it is up.

        Args:
            config: as that process gave it to :meth:`start`.
            client: one of its ``others``.
            recorder: gets the statistics, in place of vLLM's own loggers.
        """
        from vllm.v1.executor.abstract import Executor
        from vllm.v1.metrics.loggers import PrometheusStatLogger

        llm = _async_llm(
            args, config, Executor, [recorder.attach],
            client_count=config.parallel_config._api_process_count,
            client_index=client.index,
            client_addresses={
                "input_address": client.input_address,
                "output_address": client.output_address,
            },
        )  # fmt: skip
        manager = llm.logger_manager
        # vLLM always adds this one. The process that started the engine exports the statistics.
        manager.stat_loggers = [
            it for it in manager.stat_loggers if not isinstance(it, PrometheusStatLogger)
        ]
        return cls(llm)

    @property
    def dead(self) -> bool:
        """Whether the engine's processes have ended by themselves. They do not come back."""
        return bool(self.llm.errored)

    @property
    def busy(self) -> bool:
        """Whether the engine has requests of this process, so that it should be making steps."""
        return bool(self.llm.output_processor.has_unfinished_requests())

    async def stop(self) -> None:
        """End the engine's processes."""
        await asyncio.to_thread(self.llm.shutdown, 0)


def _async_llm(
    args: Namespace, config: VllmConfig, executor: Any, loggers: list[Any], **client: Any
) -> AsyncLLM:
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM(
        config,
        executor_class=executor,
        usage_context=UsageContext.OPENAI_API_SERVER,
        stat_loggers=loggers,
        log_requests=args.enable_log_requests,
        log_stats=not args.disable_log_stats,
        aggregate_engine_logging=args.aggregate_engine_logging,
        **client,
    )
