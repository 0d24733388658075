"""What is used of vLLM that it does not promise: these fail when an upgrade changes it.

Only what would fail late or in silence; what an engine cannot start without, tests/cluster shows.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest
from vllm import envs
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.exception_handling.handlers import vllm_error
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor

from serve_app.config.environment import environment
from serve_app.config.settings import Adapter, ModelConfig
from serve_app.replica.adapters import Adapters
from serve_app.replica.start import gpu


async def test_vllm_loads_and_forgets_adapters_as_it_is_told() -> None:
    """Its own handlers' record and lock, and its question for one that is not there."""
    llm: Any = MagicMock(
        add_lora=AsyncMock(), remove_lora=AsyncMock(), reset_prefix_cache=AsyncMock()
    )
    models = OpenAIServingModels(llm, [BaseModelPath("m", "org/m")])
    front_ends: Any = SimpleNamespace(
        first=SimpleNamespace(serving_models=models), forget=AsyncMock()
    )
    adapters = Adapters(llm, front_ends)
    await adapters.apply([Adapter(name="poet", path="/poet")])
    assert models.lora_requests["poet"].lora_path == "/poet"
    assert await models.resolve_lora("poet") is models.lora_requests["poet"]
    loaded = llm.add_lora.call_args.args[0]
    await adapters.apply([])
    assert models.lora_requests == {}
    llm.remove_lora.assert_awaited_once_with(loaded.lora_int_id)
    llm.reset_prefix_cache.assert_awaited_once()
    assert (await models.resolve_lora("poet")).error.code == 404
    adapters._wanted = {"poet": "/poet"}  # a request is the first to ask for it
    assert (await models.resolve_lora("poet")).lora_path == "/poet"


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("check_health", {}),
        ("get_supported_tasks", {}),
        ("remove_lora", {"lora_id": 1}),
        ("reset_prefix_cache", {"reset_running_requests": True}),
        ("shutdown", {"timeout": 0}),
        ("sleep", {"level": 1}),
        ("wake_up", {}),
    ],
)
def test_the_engine_takes_what_it_is_told_while_it_serves(
    method: str, arguments: dict[str, Any]
) -> None:
    inspect.signature(getattr(AsyncLLM, method)).bind(None, **arguments)


def test_the_engine_says_whether_it_is_dead_and_whether_it_is_busy() -> None:
    """By these a replica whose engine died or hangs ends itself."""
    assert isinstance(AsyncLLM.errored, property)
    processor = OutputProcessor(None, log_stats=False)
    assert processor.has_unfinished_requests() is False
    assert "self.output_processor = " in inspect.getsource(AsyncLLM.__init__)


async def test_vllms_handler_of_a_dead_engine_has_a_server_to_stop() -> None:
    """Ours, which does nothing: the replica ends the whole process."""
    server = SimpleNamespace()
    state = SimpleNamespace(
        server=server,
        engine_client=SimpleNamespace(errored=True, is_running=False),
        args=SimpleNamespace(log_error_stack=False),
    )
    request: Any = SimpleNamespace(app=SimpleNamespace(state=state))
    answer = await vllm_error.engine_error_handler(request, RuntimeError("dead"))
    assert answer.status_code == 500
    assert server.should_exit is True


def test_vllm_reads_every_variable_that_is_set_for_it() -> None:
    adapters = [{"name": "a", "path": "p"}]
    everything = ModelConfig.model_validate(
        {"model": "m", "cache_dir": "/c", "adapters": adapters, "resources": {"device": "cpu"}}
    )
    given = {name for name in environment(everything) if name.startswith("VLLM_")}
    assert len(given) >= 6
    assert given <= envs.environment_variables.keys()


def test_nvml_has_what_is_asked_of_a_gpu() -> None:
    """What replica/start/gpu.py calls; tests/unit/test_turn.py plays it."""
    from vllm.third_party import pynvml

    code = (Path(gpu.__file__)).read_text()
    asked = set(re.findall(r"nvml\.(nvml\w+)\(", code))
    assert len(asked) == 8
    assert all(callable(getattr(pynvml, name, None)) for name in asked)
    assert issubclass(pynvml.NVMLError, Exception)
