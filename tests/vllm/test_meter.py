"""The meter against vLLM's own output processor: what it counts is what vLLM counts."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import IterationStats, PrefillStats

from serve_app.cluster.exchange import Called, Usage
from serve_app.replica import meter
from serve_app.replica.meter import Meter
from serve_app.replica.reports import Reports

CALLED = Called("1", "g", "team-a", "m", "m", "/v1/completions", 0.0)
PROMPT = [1, 2, 3, 4, 5]


class Engine:
    """vLLM's output processor, which is told what an engine would have generated."""

    def __init__(self, log_stats: bool) -> None:
        self.output_processor = OutputProcessor(None, log_stats=log_stats)
        self.stats = IterationStats() if log_stats else None
        self.reports = Reports(lambda: None)
        meter.install(SimpleNamespace(output_processor=self.output_processor))

    def http_request(self) -> Meter:
        metered = Meter(CALLED, self.reports)
        meter.current.set(metered)
        return metered

    def add(self, id: str) -> None:
        params = SamplingParams(detokenize=False, output_kind=RequestOutputKind.DELTA)
        request = EngineCoreRequest(
            request_id=id,
            external_req_id=f"x-{id}",
            prompt_token_ids=PROMPT,
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        queue: Any = SimpleNamespace(put=lambda output: None)
        self.output_processor.add_request(request, None, None, 0, queue)

    def generated(self, id: str, tokens: int, *, first: bool = False, last: bool = False) -> None:
        prefill = PrefillStats() if first else None
        if prefill:
            prefill.set(len(PROMPT), 2, 0)
        output = EngineCoreOutput(
            id,
            [7] * tokens,
            finish_reason=FinishReason.LENGTH if last else None,
            prefill_stats=prefill,
        )
        self.output_processor.process_outputs([output], 0.0, self.stats)

    async def told(self) -> list[Usage | None]:
        box = self.reports._boxes.get("g")
        return [it.usage for it in box.reports] if box else []


@pytest.fixture(params=[True, False], ids=["with statistics", "without"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(request.param)


async def test_a_request_is_reported_when_it_has_ended(engine: Engine) -> None:
    metered = engine.http_request()
    engine.add("a")
    engine.generated("a", 1, first=True)
    engine.generated("a", 3, last=True)
    assert await engine.told() == []
    metered.answered()
    assert await engine.told() == [Usage(5, 2, 4)]
    if engine.stats:
        assert (engine.stats.num_prompt_tokens, engine.stats.num_generation_tokens) == (5, 4)


async def test_an_aborted_one_counts_as_far_as_it_came(engine: Engine) -> None:
    metered = engine.http_request()
    for id in ("begun", "not begun"):
        engine.add(id)
    engine.generated("begun", 1, first=True)
    engine.generated("begun", 2)
    metered.answered()  # the client left; vLLM aborts a moment later
    assert await engine.told() == []
    engine.output_processor.abort_requests(["begun", "not begun"], internal=True)
    assert await engine.told() == [Usage(5, 2, 3)]
    engine.generated("begun", 4)  # too late: vLLM does not count it either
    if engine.stats:
        assert (engine.stats.num_prompt_tokens, engine.stats.num_generation_tokens) == (5, 3)


async def test_requests_of_one_http_request_are_summed(engine: Engine) -> None:
    metered = engine.http_request()
    await asyncio.gather(*(asyncio.to_thread(engine.add, id) for id in "abc"))
    for id in "abc":
        engine.generated(id, 2, first=True, last=True)
    metered.answered()
    assert await engine.told() == [Usage(15, 6, 6)]


async def test_one_that_reached_no_engine_took_nothing(engine: Engine) -> None:
    engine.http_request().answered()
    assert await engine.told() == [Usage()]


async def test_requests_at_once_are_told_apart(engine: Engine) -> None:
    async def request(id: str, tokens: int) -> None:
        metered = engine.http_request()
        await asyncio.sleep(0)
        engine.add(id)
        await asyncio.sleep(0)
        engine.generated(id, tokens, first=True, last=True)
        metered.answered()

    await asyncio.gather(request("a", 1), request("b", 8))
    assert sorted(it.completion_tokens for it in await engine.told() if it) == [1, 8]
