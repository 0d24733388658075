"""The simulator of benchmarks/routing: its traces, its engine, and that it loses no request."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest

from benchmarks.routing import peers, simulation, traces
from benchmarks.routing.engine import BLOCK, H100_8B, Cache, Engine, Request, Speed
from benchmarks.routing.fleet import Fleet
from benchmarks.routing.policies import POLICIES
from benchmarks.routing.traces import TRACES, Session, Turn

H100 = Path(simulation.__file__).parents[1] / "results" / "h100.json"

SMALL = Speed(0.001, 0.005, 10_000, 1e-7, batch_tokens=512, most_seqs=8, kv_tokens=4096)


def first(trace: str, sessions: int) -> list[tuple[Turn, ...]]:
    return list(islice(TRACES[trace].sessions(random.Random(1)), sessions))


class TestTraces:
    @pytest.mark.parametrize(
        ("trace", "least", "most"),
        [("b2b-saas", 0.79, 0.84), ("26 % shared", 0.25, 0.27), ("reasoning", 0, 0),
         ("all different", 0, 0)],
    )  # fmt: skip
    def test_share_of_tokens_that_an_earlier_prompt_had(
        self, trace: str, least: float, most: float
    ) -> None:
        seen: set[int] = set()
        shared = total = 0
        for (turn,) in first(trace, 3000):
            prompt = traces.blocks(turn.pieces, turn.prompt_tokens, BLOCK)
            shared += next((n for n, it in enumerate(prompt) if it not in seen), len(prompt))
            total += len(prompt)
            seen.update(prompt)
        assert least <= shared / total <= most

    def test_b2b_saas_has_150_customers_with_five_questions_each_before_any_has_a_sixth(
        self,
    ) -> None:
        customers = [turn.pieces[0] for (turn,) in first("b2b-saas", 750)]
        assert len(set(customers)) == 150
        assert {customers.count(it) for it in set(customers)} == {5}

    def test_code_agents_read_131_tokens_for_each_that_they_write(self) -> None:
        turns = [turn for session in first("code-agent", 300) for turn in session]
        ratio = sum(it.prompt_tokens for it in turns) / sum(it.output_tokens for it in turns)
        assert ratio == pytest.approx(131, rel=0.1)

    @pytest.mark.parametrize("trace", TRACES)
    def test_number_of_turns_is_as_stated(self, trace: str) -> None:
        turns = [len(session) for session in first(trace, 2000)]
        assert statistics.mean(turns) == pytest.approx(TRACES[trace].turns, rel=0.1)

    def test_a_conversations_next_prompt_has_its_last_one_and_the_answer(self) -> None:
        for session in first("multi-turn", 50):
            for before, after in pairwise(session):
                said = before.prompt_tokens + before.output_tokens
                whole = traces.blocks(before.pieces, said, BLOCK)
                prompt = traces.blocks(after.pieces, after.prompt_tokens, BLOCK)
                assert prompt[: len(whole)] == whole
                assert traces.text(after).startswith(traces.text(before))

    @pytest.mark.parametrize("size", [16, 256])
    def test_prompts_have_blocks_in_common_as_far_as_their_text_is_the_same(
        self, size: int
    ) -> None:
        one, other = (Turn(((1, 1000), (own, 1500)), 1500, 1) for own in (2, 3))
        texts = [traces.text(it) for it in (one, other)]
        assert [len(it) for it in texts] == [1500 * traces.BYTES_PER_TOKEN] * 2
        same = next(n for n, (a, b) in enumerate(zip(*texts, strict=True)) if a != b)
        blocks = [traces.blocks(it.pieces, 1500, size) for it in (one, other)]
        common = sum(a == b for a, b in zip(*blocks, strict=True))
        assert common == 1000 // size == same // traces.BYTES_PER_TOKEN // size
        assert len(blocks[0]) == len(set(blocks[0])) == 1500 // size

    def test_the_same_seed_makes_the_same_trace_at_the_stated_rate(self) -> None:
        one, again, other = (TRACES["multi-turn"].at(50, 200, seed) for seed in (1, 1, 2))
        assert one == again != other
        assert sum(len(it.turns) for it in one) / 200 == pytest.approx(50, rel=0.1)


class TestCache:
    def test_the_least_recently_used_prompt_is_evicted_first_and_its_tail_before_its_beginning(
        self,
    ) -> None:
        cache = Cache(6)
        for prompt in ((1, 2, 3), (4, 5, 6)):
            cache.take(prompt)
            cache.release(prompt)
        cache.take((1, 2, 3))
        cache.release((1, 2, 3))
        cache.take((7, 8))
        assert [cache.found(it) for it in ((1, 2, 3), (4, 5, 6), (7, 8))] == [3, 1, 2]

    def test_what_is_in_use_is_not_evicted(self) -> None:
        cache = Cache(4)
        cache.take((1, 2))
        cache.take((3, 4))
        cache.release((3, 4))
        assert not cache.fits((5, 6, 7), 0)
        assert cache.fits((5, 6), 0)
        cache.take((5, 6))
        assert (cache.found((1, 2)), cache.found((3, 4)), cache.free) == (2, 0, 0)

    def test_a_prefix_that_two_use_takes_its_place_once(self) -> None:
        cache = Cache(4)
        cache.take((1, 2))
        cache.take((1, 2, 3))
        assert cache.used == 3
        cache.release((1, 2, 3))
        assert cache.used == 2


def play(engine: Engine, requests: Sequence[Request], at: float = 0.0) -> list[Request]:
    """All of these come at once; in the order in which they end."""
    for request in requests:
        engine.add(request, at)
    ended: list[Request] = []
    while engine.ends < float("inf"):
        ended += engine.step_ended()[1]
    return ended


def request(stream: int, prompt: int, output: int) -> Request:
    return Request(prompt, output, traces.blocks(((stream, prompt),), prompt + output, BLOCK))


class TestEngine:
    def test_a_prompt_is_read_in_steps_and_then_a_token_comes_with_each(self) -> None:
        engine = Engine(SMALL)
        (done,) = play(engine, [request(1, 1000, 5)])
        steps = [SMALL.step(512, 0, 0), SMALL.step(488, 0, 0)]
        assert done.first_token == pytest.approx(sum(steps))
        # Steps that are counted together take what the first of them does.
        assert done.ended - done.first_token == pytest.approx(4 * SMALL.step(0, 1, 1000), rel=0.01)

    def test_what_an_earlier_request_had_is_not_read_again_but_for_the_last_token(self) -> None:
        engine = Engine(SMALL)
        play(engine, [request(1, 960, 5)])
        (again,) = play(engine, [request(1, 960, 5)], 100.0)
        assert again.cached_tokens == 959

    def test_requests_of_the_same_step_share_the_same_prefix(self) -> None:
        one, two = (
            Request(320, 2, traces.blocks(((1, 160), (n, 320)), 322, BLOCK)) for n in (2, 3)
        )
        play(Engine(SMALL), [one, two])
        assert (one.cached_tokens, two.cached_tokens) == (0, 160)

    def test_no_more_run_than_may_and_the_first_that_came_are_the_first(self) -> None:
        engine = Engine(SMALL)
        requests = [request(n, 32, 20) for n in range(12)]
        for it in requests:
            engine.add(it, 0.0)
        most = 0
        while engine.ends < float("inf"):
            engine.step_ended()
            most = max(most, engine.running)
        assert most == SMALL.most_seqs
        begun = [it.first_token for it in requests]
        assert begun == sorted(begun)

    def test_the_cache_bounds_what_runs_and_who_is_preempted_still_ends_with_all_its_tokens(
        self,
    ) -> None:
        engine = Engine(SMALL)
        requests = [request(n, 1000, 400) for n in range(6)]  # three prompts fit, not their answers
        ended = play(engine, requests)
        assert sorted(map(id, ended)) == sorted(map(id, requests))
        assert sum(it.preempted for it in requests) > 0
        assert all(it.ended > it.first_token for it in requests)
        assert engine.cache.used == engine.running == 0

    def test_nothing_is_left_in_use_after_many_requests_of_all_sizes(self) -> None:
        rng = random.Random(1)
        requests = [
            request(rng.randrange(5), rng.randrange(1, 1500), rng.randrange(1, 300))
            for _ in range(200)
        ]
        engine = Engine(SMALL)
        assert len(play(engine, requests)) == 200
        assert engine.cache.used == 0
        assert engine.cache.free == engine.cache.size

    @pytest.mark.parametrize(("clients", "requests"), [(1, 12), (64, 256), (256, 768)])
    def test_it_is_as_fast_as_what_was_measured_on_an_h100(
        self, clients: int, requests: int
    ) -> None:
        compared = json.loads(H100.read_text())["compare"]
        rounds = [it["bare"][f"c{clients}"]["output_throughput"] for it in compared["rounds"]]
        speed = replace(H100_8B, kv_tokens=147_456)  # 18 GiB, as there
        turns = [
            tuple(Turn(((k * 1000 + n, 512),), 512, 128) for n in range(requests // clients))
            for k in range(clients)
        ]
        fleet = Fleet(speed, 1, 1, POLICIES["vllm-router cache_aware"], 1)
        outcome = fleet.run([Session(0.0, it) for it in turns], 0.0, 1e6, 1e6)
        assert outcome.ended == requests
        found = requests * 128 / fleet.last_end
        assert found == pytest.approx(statistics.median(rounds), rel=0.1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("gateways", [1, 3])
def test_each_request_that_comes_ends_once(policy: str, gateways: int) -> None:
    sessions = TRACES["multi-turn"].at(60, 10, 1)
    fleet = Fleet(replace(H100_8B, kv_tokens=40_000), 3, gateways, POLICIES[policy], 1)
    outcome = fleet.run(sessions, 0.0, 1e5, 1e6)
    turns = sum(len(it.turns) for it in sessions)
    assert outcome.arrived == outcome.ended == len(outcome.ttft_s) == turns
    assert outcome.unfinished == 0
    assert sum(outcome.reasons.values()) == turns
    assert outcome.prompt_tokens == sum(it.prompt_tokens for s in sessions for it in s.turns)
    assert all(it.inflight == 0 for gateway in fleet.gateways for it in gateway.front_ends)


def test_the_same_seed_gives_the_same_run() -> None:
    case = simulation.Case("b2b-saas", 2, 2, "cache_aware", 1.0, 1)
    short = TRACES["b2b-saas"].at(4, 30, 1)
    runs = [Fleet(H100_8B, 2, 2, POLICIES[case.policy], 1).run(short, 0, 30, 300) for _ in "ab"]
    assert runs[0] == runs[1]


class TestVllmRoutersCacheAware:
    def test_a_prompt_goes_to_who_had_most_of_it_and_a_new_one_to_the_least_loaded(self) -> None:
        policy = peers.CacheAware()
        assert policy.choose([1, 0, 2], [1, 2, 3, 4]) == (1, "unmatched", 0)
        assert policy.choose([0, 5, 0], [1, 2, 3, 4])[:2] == (1, "matched")
        assert policy.choose([0, 5, 0], [1, 9, 8, 7])[1] == "unmatched"  # a quarter is too little

    def test_a_node_stays_its_makers_after_the_load_has_sent_others_elsewhere(self) -> None:
        policy = peers.CacheAware()
        policy.choose([0, 9], [1, 2, 3, 4])
        assert policy.choose([80, 10], [1, 2, 3, 4])[:2] == (1, "imbalanced")
        assert policy.choose([10, 10], [1, 2, 3, 4])[:2] == (0, "matched")

    def test_load_counts_only_where_it_differs_by_more_than_64_and_by_half(self) -> None:
        policy = peers.CacheAware()
        policy.choose([0, 9], [1, 2, 3, 4])
        assert policy.choose([64, 0], [1, 2, 3, 4])[1] == "matched"
        assert policy.choose([300, 201], [1, 2, 3, 4])[1] == "matched"
        assert policy.choose([65, 0], [1, 2, 3, 4])[1] == "imbalanced"
