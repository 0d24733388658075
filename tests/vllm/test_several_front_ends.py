"""What several front ends of one engine use of vLLM, without a model.

vLLM's own clients and the sockets, queues and scheduler of its EngineCore, which has no executor
here: nothing is computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import pickle
import queue
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from multiprocessing.reduction import ForkingPickler
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import cloudpickle
import pytest
import ray
import torch
from harness.processes import REPO
from vllm import envs
from vllm.config import VllmConfig
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.request import LoRARequest
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.renderers.base import BaseRenderer
from vllm.sampling_params import SamplingParams
from vllm.transformers_utils.config import maybe_register_config_serialize_by_value
from vllm.utils.network_utils import make_zmq_socket
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    async_llm,
    core_client,
)
from vllm.v1.engine import core as engine_core
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore, EngineCoreProc, EngineShutdownState
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.metrics import loggers, ray_wrappers
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats
from vllm.v1.structured_output import StructuredOutputManager

from serve_app.config.settings import ModelConfig
from serve_app.replica import clients, gang
from serve_app.replica.clients import Client
from serve_app.replica.engine import Engine, configure, parse_args
from serve_app.replica.load import EngineLoad
from serve_app.replica.recorder import Recorder

COUNT = 2


def config(count: int = COUNT) -> Any:
    """Of the demo's chat model, as a replica makes it for so many front ends."""
    folder = str(REPO / "models/smollm2-135m-instruct")
    on_cpu = {"resources": {"device": "cpu"}, "engine": {"max_model_len": 64}}
    model = ModelConfig.model_validate({"model": folder, **on_cpu})
    return configure(parse_args(model, ["m"], {}), count)


class Core(EngineCoreProc):  # type: ignore[misc]
    """EngineCore's process in two threads of this one."""

    def __init__(self, vllm_config: Any, addresses: Any) -> None:
        self.vllm_config = vllm_config
        self.engine_index = 0
        self.input_queue: queue.Queue[Any] = queue.Queue()
        self.output_queue: queue.Queue[Any] = queue.Queue()
        self.aborts_queue: queue.Queue[Any] = queue.Queue()
        self.tensor_ipc_receiver = self.mm_receiver_cache = self.request_block_hasher = None
        self.frontend_stats_publish_address = None
        self.shutdown_state = EngineShutdownState.RUNNING
        self.model_executor = MagicMock(supports_draft_weight_updates=lambda: False)
        spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32)
        vllm_config.cache_config.num_gpu_blocks = 10
        self.scheduler = Scheduler(
            vllm_config,
            KVCacheConfig(10, [], [KVCacheGroupSpec(["layer"], spec)]),
            StructuredOutputManager(vllm_config),
            block_size=16,
        )
        targets = [
            (self._inputs, (addresses.inputs, None, b"\x00\x00", threading.Event())),
            (self.process_output_sockets, (addresses.outputs, None, 0)),
        ]
        self._threads = [threading.Thread(target=t, args=a, daemon=True) for t, a in targets]
        for thread in self._threads:
            thread.start()

    def _inputs(self, *args: Any) -> None:
        with contextlib.suppress(ValueError):  # a message of no known type: see `end`
            self.process_input_sockets(*args)

    async def handle(self) -> None:
        """Do what the next message asks for, as the busy loop of EngineCore does."""
        self._handle_client_request(*await asyncio.to_thread(self.input_queue.get, timeout=20))

    def generated(self, request: str) -> None:
        """Give a request a token."""
        output = EngineCoreOutputs(outputs=[EngineCoreOutput(request, [7])])
        self.output_queue.put((self.scheduler.requests[request].client_index, output))

    async def end(self, client: Any) -> None:
        await client.input_socket.send_multipart((client.core_engine, b"?"))
        self.output_queue.put(self.ENGINE_CORE_DEAD)
        for thread in self._threads:
            await asyncio.to_thread(thread.join, 20)
        assert not any(thread.is_alive() for thread in self._threads)


class Party:
    """An engine and those who use it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        @contextlib.contextmanager
        def launch(config: Any, executor: Any, log_stats: bool, addresses: Any) -> Iterator[Any]:
            self.core = Core(config, addresses)
            yield SimpleNamespace(
                coordinator=None, engine_manager=None, addresses=addresses, tensor_queue=None
            )

        def unlingering(*args: Any, **more: Any) -> Any:
            """A socket that ends at once, also with a message that nobody has come for."""
            return make_zmq_socket(*args, **{**more, "linger": 0})

        monkeypatch.setattr(core_client, "launch_core_engines", launch)
        monkeypatch.setattr(engine_core, "make_zmq_socket", unlingering)
        # Else a client that EngineCore does not know of waits for it for as long as a start may.
        monkeypatch.setattr(core_client, "VLLM_ENGINE_READY_TIMEOUT_S", 20)
        self.others = clients.beyond_the_first(COUNT)
        self.open: list[Any] = []
        with clients.announced(self.others):
            self.first = self._client()

    def join(self, client: Client) -> Any:
        addresses = {"input_address": client.input_address, "output_address": client.output_address}
        return self._client(client_addresses=addresses, client_index=client.index)

    async def add(self, client: Any, request: str) -> None:
        params = SamplingParams(max_tokens=5)
        args = (request, [1, 2], None, params, None, 0.0, None, None, None)
        await client.add_request_async(EngineCoreRequest(*args))
        await self.core.handle()

    async def end(self) -> None:
        await self.core.end(self.first)
        for client in self.open:
            client.shutdown()

    def _client(self, **more: Any) -> Any:
        make = core_client.EngineCoreClient.make_async_mp_client
        client = make(config(), Executor, False, client_count=COUNT, **more)
        self.open.append(client)
        return client


@pytest.fixture
async def party(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Party]:
    one = Party(monkeypatch)
    yield one
    await one.end()


async def test_each_client_gets_the_output_of_its_own_requests(party: Party) -> None:
    second = party.join(party.others[0])
    await party.add(party.first, "a")
    await party.add(second, "b")
    for request, client in (("b", second), ("a", party.first)):
        party.core.generated(request)
        answer = await asyncio.wait_for(client.get_output_async(), 20)
        assert [it.request_id for it in answer.outputs] == [request]
    assert party.first.outputs_queue.empty() and second.outputs_queue.empty()


async def test_a_spare_client_joins_long_after_the_start(party: Party) -> None:
    """EngineCore says to each address, once, that it is ready: also where nobody reads yet."""
    party.join(party.others[0]).shutdown()
    await party.add(party.first, "a")
    spare = party.join(party.others[1])
    await party.add(spare, "b")
    party.core.generated("b")
    answer = await asyncio.wait_for(spare.get_output_async(), 20)
    assert answer.outputs[0].request_id == "b"


async def test_the_requests_of_a_client_that_is_gone_end(
    monkeypatch: pytest.MonkeyPatch, party: Party
) -> None:
    monkeypatch.setattr(EngineCore, clients.ABORT, None, raising=False)
    clients.prepare()  # as vLLM's plugins do in EngineCore's process
    second = party.join(party.others[0])
    for client, request in ((party.first, "a"), (second, "b"), (second, "c")):
        await party.add(client, request)
    assert party.core.scheduler.requests.keys() == {"a", "b", "c"}
    second.shutdown()
    llm = SimpleNamespace(engine_core=party.first)
    aborting = asyncio.create_task(clients.abort(llm, party.others[0]))
    await party.core.handle()
    await asyncio.wait_for(aborting, 20)
    assert party.core.scheduler.requests.keys() == {"a"}


def test_engine_core_loads_plugins_once_its_class_is_there() -> None:
    """``clients.prepare``, one of them, gives the class a method."""
    assert "load_general_plugins()" in inspect.getsource(EngineCore.__init__)


# --- the configuration ---------------------------------------------------------------------------


def test_the_number_of_front_ends_is_in_the_configuration() -> None:
    parallel = config(3).parallel_config
    assert (parallel._api_process_count, parallel._api_process_rank) == (3, 0)


def test_media_are_not_cached_where_two_front_ends_and_the_engine_would_share_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each would believe that the engine has what only another one has sent."""
    monkeypatch.setattr(MULTIMODAL_REGISTRY, "supports_multimodal_inputs", lambda model: True)
    media = SimpleNamespace(mm_processor_cache_gb=1, mm_processor_cache_type="lru")
    kinds = []
    for count in (1, 2):
        made = config(count)
        made.model_config.multimodal_config = media
        kinds.append(MULTIMODAL_REGISTRY._get_cache_type(made))
    assert kinds == ["lru", "processor_only"]


def test_vllm_reads_which_front_end_it_is_in() -> None:
    made = config(3)
    made.parallel_config._api_process_rank = 2  # as further.py does
    assert "config.parallel_config._api_process_rank" in inspect.getsource(BaseRenderer.__init__)


def test_a_configuration_with_a_models_own_classes_reaches_another_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With ``trust_remote_code``; vLLM tells multiprocessing's pickler to send them by value."""
    modules: Any = ModuleType("transformers_modules")
    modules.Own = type("Own", (), {"__module__": modules.__name__, "layers": 3})
    with monkeypatch.context() as here:
        here.setitem(sys.modules, modules.__name__, modules)
        maybe_register_config_serialize_by_value()
        try:
            sent = ForkingPickler.dumps(VllmConfig(additional_config={"own": modules.Own()}))
        finally:
            cloudpickle.unregister_pickle_by_value(modules)
            ray.cloudpickle.unregister_pickle_by_value(modules)
    with pytest.raises(ImportError):  # as in the other process
        importlib.import_module(modules.__name__)
    assert pickle.loads(sent).additional_config["own"].layers == 3


# --- statistics ----------------------------------------------------------------------------------


class Exporter(loggers.AggregateStatLoggerBase):  # type: ignore[misc]
    """In place of vLLM's loggers for Prometheus, which a process can have once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.got: list[Any] = []

    def record(self, *stats: Any, **more: Any) -> None:
        self.got.append((*stats, *more.values()))

    def log_engine_initialized(self) -> None:
        pass


class Rays(Exporter):
    pass


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    """How AsyncLLM makes its client; around it there is no tokenizer and no engine."""
    for name in ("renderer_from_config", "InputProcessor", "OutputProcessor", "EngineCoreClient"):
        monkeypatch.setattr(async_llm, name, MagicMock())
    monkeypatch.setattr(loggers, "PrometheusStatLogger", Exporter)
    monkeypatch.setattr(ray_wrappers, "RayPrometheusStatLogger", Rays)
    monkeypatch.setattr(AsyncLLM, "_run_output_handler", lambda self: None)
    monkeypatch.setattr(gang, "member", lambda: 0)
    client: Any = async_llm.EngineCoreClient.make_async_mp_client
    client.return_value.engine_ranks_managed = [0]
    return client


def arguments(**more: Any) -> Any:
    defaults = {"enable_log_requests": False, "aggregate_engine_logging": False}
    return SimpleNamespace(**{**defaults, "disable_log_stats": False, **more})


def names(llm: Any) -> list[str]:
    """Classes of its loggers, those of one engine without their adapter."""
    return [
        type(one).__name__
        for logger in llm.logger_manager.stat_loggers
        for one in getattr(logger, "per_engine_stat_loggers", {0: logger}).values()
    ]


RECORD = (
    SchedulerStats(num_running_reqs=3),
    IterationStats(),
    MultiModalCacheStats(requests=2),
    0,
)


def test_a_further_front_end_keeps_statistics_and_exports_none(made: Any) -> None:
    recorder = Recorder()
    client = Client(2, "ipc:///in", "ipc:///out")
    engine = Engine.join(arguments(), config(3), client, recorder)
    assert names(engine.llm) == ["Recorder"]
    engine.llm.logger_manager.record(*RECORD)
    assert recorder.take() == [RECORD]
    assert recorder.take() == []
    given = made.call_args.kwargs
    assert (given["client_count"], given["client_index"]) == (3, 2)
    assert given["client_addresses"] == {
        "input_address": "ipc:///in", "output_address": "ipc:///out",
    }  # fmt: skip


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("off", [False, True])
def test_the_first_logs_and_exports_once(made: Any, count: int, off: bool) -> None:
    others = clients.beyond_the_first(count - 1)
    load = EngineLoad("m")
    engine = Engine.start(arguments(disable_log_stats=off), config(count), load, others)
    logged = [] if off else ["LoggingStatLogger"]
    assert names(engine.llm) == ["EngineLoad", "Rays", "Exporter", *logged]
    assert made.call_args.kwargs["client_count"] == count


def test_what_another_front_end_got_counts_as_the_first_ones_own(made: Any) -> None:
    load = EngineLoad("m")
    engine = Engine.start(arguments(), config(), load, clients.beyond_the_first(1))
    scheduler, iteration, cache, index = pickle.loads(ForkingPickler.dumps(RECORD))
    assert (scheduler, cache) == (RECORD[0], RECORD[2])
    iteration.num_generation_tokens = 5
    engine.llm.logger_manager.record(scheduler, iteration, cache, index)
    assert load.stats()["running"] == 3
    exporter = engine.llm.logger_manager.stat_loggers[2]
    assert exporter.got == [(scheduler, iteration, cache, index)]


# --- adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("serving_class", [BaseServing, PoolingBaseServing])
async def test_vllm_asks_the_replaced_resolve_lora_for_an_adapter_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, serving_class: Any
) -> None:
    """A further front end's: it asks the first, which has the numbers of all adapters."""
    monkeypatch.setattr(envs, "VLLM_ALLOW_RUNTIME_LORA_UPDATING", True, raising=False)
    models: Any = OpenAIServingModels(MagicMock(), [BaseModelPath("m", "org/m")])
    poet = LoRARequest(lora_name="poet", lora_int_id=4, lora_path="/poet")
    models.resolve_lora = AsyncMock(return_value=poet)  # as further.py does
    serving: Any = SimpleNamespace(models=models, _is_model_supported=models.is_base_model)
    request: Any = SimpleNamespace(model="poet")
    assert await serving_class._check_model(serving, request) is None
    models.resolve_lora.assert_awaited_once_with("poet")
    models.lora_requests["poet"] = poet  # as the first told it to learn
    assert await serving_class._check_model(serving, request) is None
    models.resolve_lora.assert_awaited_once()


def test_what_the_first_answers_goes_through_a_pipe() -> None:
    poet = LoRARequest(lora_name="poet", lora_int_id=4, lora_path="/poet")
    none = create_error_response(message="there is none", err_type="NotFoundError")
    for answer in (poet, none):
        assert pickle.loads(ForkingPickler.dumps(answer)) == answer
