"""The parts of the choice of a replica: a prompt's key, the index, what replicas have to do, and
the choice itself."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.cluster.exchange import Load, Usage
from serve_app.config.settings import GatewayConfig, ModelConfig, RoutingConfig, parse
from serve_app.errors import ConfigError
from serve_app.gateway.replicas import FrontEnd, Replica
from serve_app.gateway.routing import prefix
from serve_app.gateway.routing.choice import CacheAware
from serve_app.gateway.routing.held import Held
from serve_app.gateway.routing.index import Index
from serve_app.gateway.routing.prefix import BLOCK, MOST, Prompt
from serve_app.gateway.routing.work import Backlog

# --- the key -------------------------------------------------------------------------------------


def prompt_of(
    body: Any, model_id: str = "m", path: str = "/v1/chat/completions", **more: Any
) -> Prompt:
    given = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = [(k.encode(), v.encode()) for k, v in more.pop("headers", {}).items()]
    call: Any = SimpleNamespace(
        model_id=model_id,
        model=SimpleNamespace(name="m", adapters=("lora",)),
        request=SimpleNamespace(body=given, headers=headers, path=path),
    )
    return prefix.of(call, **more)


def said(*texts: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"model": "m", "messages": messages, **more}


def common(a: Prompt, b: Prompt) -> int:
    """How many leading blocks two prompts have in common."""
    return next(
        (n for n, (x, y) in enumerate(zip(a.blocks, b.blocks, strict=False)) if x != y),
        min(len(a.blocks), len(b.blocks)),
    )


LONG, OTHER = "a" * 5000, "b" * 5000


def test_the_next_turn_of_a_conversation_has_all_blocks_of_the_turn_before() -> None:
    first, second = prompt_of(said(LONG)), prompt_of(said(LONG, OTHER, "and now?"))
    assert common(first, second) == len(first.blocks) == first.size // BLOCK == 4
    assert common(first, prompt_of(said(OTHER))) == 0


def test_a_key_is_in_the_order_of_the_chat_template_whatever_the_clients() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": LONG}}]
    one, two = said("hi", tools=tools), said("another question", tools=tools)
    other_way = json.dumps(dict(reversed(two.items()))).encode()
    assert common(prompt_of(one), prompt_of(other_way)) == 4  # those of the tools
    assert prompt_of(two).blocks == prompt_of(other_way).blocks


@pytest.mark.parametrize("more", [{"cache_salt": "mine"}, {"chat_template_kwargs": {"x": 1}}])
def test_what_makes_another_prompt_of_the_same_messages_makes_another_key(more: Any) -> None:
    assert common(prompt_of(said(LONG)), prompt_of(said(LONG, **more))) == 0


def test_an_adapter_has_a_cache_of_its_own_and_an_alias_has_not() -> None:
    own, alias, adapter = (prompt_of(said(LONG), id) for id in ("m", "org/m", "lora"))
    assert own.blocks == alias.blocks
    assert common(own, adapter) == 0


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": LONG},
        {"prompt": list(range(2000))},
        {"input": LONG, "instructions": "be brief"},
        {"system": LONG, "messages": [{"role": "user", "content": "hi"}]},
        {"token_ids": list(range(2000))},
    ],
)
def test_every_api_has_a_key(body: Any) -> None:
    assert len(prompt_of({"model": "m"} | body).blocks) >= 4


def test_a_key_is_told_as_text_of_a_hundredth_of_its_prompt() -> None:
    prompt = prompt_of(said(LONG * 20))
    key = prefix.key(prompt.blocks)
    assert prefix.blocks_of(key.decode()) == list(prompt.blocks)
    assert len(key) < prompt.size / 90
    assert b"\n" not in key and prefix.key(()) == b""


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b'{"messages": "\xff'])
def test_a_body_that_is_no_json_object_has_no_key(body: bytes) -> None:
    assert prompt_of(body).blocks == ()


def test_a_body_in_utf_16_has_the_key_of_the_same_in_utf_8() -> None:
    text = json.dumps(said(LONG))
    assert prompt_of(text.encode("utf-16")).blocks == prompt_of(text.encode()).blocks


def picture(data: str, style: str) -> dict[str, Any]:
    if style == "openai":
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return {"type": "image", "source": {"type": "base64", "data": data}}


@pytest.mark.parametrize("style", ["openai", "anthropic"])
def test_a_picture_is_a_block_of_its_hash(style: str) -> None:
    one, other = "iVBOR" + "x" * 200_000, "iVBOR" + "x" * 199_999 + "y"

    def asking(data: str) -> Prompt:
        content = [picture(data, style), {"type": "text", "text": LONG}]
        return prompt_of({"model": "m", "messages": [{"role": "user", "content": content}]})

    assert asking(one).size < 5000 + 2 * BLOCK
    assert asking(one).blocks == asking(one).blocks
    assert common(asking(one), asking(other)) == 0


class _Counted(bytes):
    """Counts how many of its bytes are looked at."""

    looked = 0

    def find(self, what: Any, start: Any = 0, end: Any = None) -> int:
        at = super().find(what, start)
        type(self).looked += (at if at >= 0 else len(self)) - start
        return at


def test_a_prompt_of_many_pictures_is_looked_at_once_and_no_further_than_others() -> None:
    """64 MiB of marks would stand still for hours else."""
    _Counted.looked = 0
    small = b'{"url":";base64,"},' * 5000
    parts = list(prefix._without_media([_Counted(small + b'{"data":"x"}')]))
    assert _Counted.looked < 3 * len(small)
    assert len(parts) <= 2 * prefix.MOST // prefix.BLOCK + 1
    assert b"".join(parts[::2]) == small + b'{"data":"x"}'


def test_no_more_than_the_beginning_of_a_prompt_is_looked_at() -> None:
    endless = prompt_of(said("x" * (2 * MOST)))
    assert len(endless.blocks) == MOST // BLOCK
    assert endless.size > 2 * MOST


def test_the_first_byte_tells_of_the_prefill_only_where_it_comes_after_it() -> None:
    assert prompt_of(said("hi", stream=True)).streams
    assert not prompt_of(said("hi")).streams
    assert not prompt_of({"input": "hi", "stream": True}, path="/v1/responses").streams


@pytest.mark.parametrize(
    ("body", "headers", "session"),
    [
        ({}, {"x-session-id": "s1"}, "s1"),
        ({"prompt_cache_key": "k1"}, {}, "k1"),
        ({"prompt_cache_key": "k1"}, {"x-session-id": "s1"}, "s1"),
        ({"prompt_cache_key": {"not": "text"}}, {}, None),
        ({}, {}, None),
    ],
)
def test_a_client_can_name_its_session(body: Any, headers: Any, session: str | None) -> None:
    assert prompt_of(said("hi", **body), headers=headers, session=True).session == session
    assert prompt_of(said("hi", **body), headers=headers).session is None


def test_a_session_that_is_no_text_is_none() -> None:
    assert prompt_of(b'{"prompt_cache_key": "\xff"}', session=True).session is None


# --- the index -----------------------------------------------------------------------------------


def blocks(name: str, count: int) -> tuple[bytes, ...]:
    return tuple(f"{name}-{n}".encode() for n in range(count))


def test_the_index_finds_how_much_of_a_prompt_each_replica_has() -> None:
    index = Index()
    index.add("r0", blocks("a", 8), 100)
    index.add("r1", blocks("a", 3), 100)
    index.add("r2", blocks("b", 8), 100)
    assert index.match(blocks("a", 10)) == {"r0": 8, "r1": 3}
    assert index.match(blocks("c", 10)) == index.match(()) == {}


def test_a_replica_forgets_what_it_has_not_used_for_longest_and_of_a_prompt_the_end_first() -> None:
    index = Index()
    for name in ("a", "b"):
        index.add("r0", blocks(name, 4), 10)
    index.add("r0", blocks("a", 4), 10)  # used again
    index.add("r0", blocks("c", 4), 10)
    assert index.match(blocks("a", 4)) == {"r0": 4}
    assert index.match(blocks("b", 4)) == {"r0": 2}
    assert index.blocks("r0") == 10
    index.add("r0", blocks("c", 4), 3)  # less than one prompt
    assert (index.blocks("r0"), index.match(blocks("c", 4))) == (3, {"r0": 3})


def test_it_is_counted_how_many_prompts_went_on_from_a_block() -> None:
    index = Index()

    def ask(replica: str, *last: str, capacity: int = 100) -> int:
        index.add(replica, blocks("a", 4) + tuple(it.encode() for it in last), capacity)
        return index.went_on(replica, blocks("a", 4)[-1])

    assert ask("r0", "x") == 0  # the first one
    assert ask("r0", "x", "y") == 0  # the same conversation, longer
    assert index.went_on("r0", b"x") == 1
    assert [ask("r0", "z"), ask("r0", "w"), ask("r0", "w"), ask("r0")] == [1, 2, 2, 2]
    assert ask("r1", "x") == 0  # each replica has its own
    index.add("r0", blocks("b", 10), 10)
    assert index.went_on("r0", blocks("a", 4)[-1]) == 0, "forgotten with the block"
    assert index.went_on("r9", b"x") == 0


def test_a_replica_that_is_gone_leaves_nothing_behind() -> None:
    index = Index()
    for n in range(200):  # more than there are at a time: a rolling update every day
        index.add(f"r{n}", blocks("a", 4), 100)
        index.add("stays", blocks("a", 2), 100)
        index.clear(f"r{n - 3}")
    index.clear("unknown")
    assert set(index.match(blocks("a", 4))) == {"stays", "r197", "r198", "r199"}
    for id in ("stays", "r197", "r198", "r199"):
        index.clear(id)
    assert not index._holders


@pytest.mark.parametrize("seed", range(5))
def test_the_index_is_the_same_as_a_plain_one(seed: int) -> None:
    """Against a model of it: for each replica the list of what it has used, the latest last."""
    chance, index = random.Random(seed), Index()
    plain: dict[str, list[bytes]] = {f"r{n}": [] for n in range(5)}
    prompts = [blocks(name, 12) for name in "abcdefgh"]
    for _ in range(500):
        id, prompt = chance.choice(list(plain)), chance.choice(prompts)
        used = prompt[: chance.randrange(1, 13)]
        if chance.random() < 0.05:
            index.clear(id)
            plain[id] = []
        else:
            index.add(id, used, 30)
            kept = [it for it in plain[id] if it not in used] + list(reversed(used))
            plain[id] = kept[-30:]
        for looked in prompts:
            has = {
                id: next((n for n, it in enumerate(looked) if it not in mine), len(looked))
                for id, mine in plain.items()
            }
            assert index.match(looked) == {id: n for id, n in has.items() if n}


# --- what a replica has to do --------------------------------------------------------------------


def test_a_replicas_rate_is_what_it_had_to_read_by_the_time_it_took() -> None:
    backlog = Backlog()
    before = backlog.rate
    for n in range(200):
        backlog.began(str(n), 900, 100, now=n, streams=True)
        assert backlog.tokens == 900
        backlog.first_byte(str(n), n + 0.5)
        assert backlog.tokens == 0
        backlog.used(str(n), 900)
    assert before == 8000
    assert backlog.rate == pytest.approx(2000, rel=0.05)


def test_an_answer_without_a_first_byte_counts_as_read_after_a_while() -> None:
    backlog = Backlog()
    backlog.began("1", 8000, 0, now=0.0, streams=False)  # a second, at 8000 tokens/s
    backlog.began("2", 8000, 0, now=0.0, streams=True)
    backlog.expire(1.9)
    assert backlog.tokens == 16000
    backlog.expire(2.1)
    assert backlog.tokens == 8000
    backlog.used("1", 8000)
    assert backlog.rate == 8000  # its end tells nothing of when it was read


# --- calls that wait for a certain replica -------------------------------------------------------


def test_held_calls_have_a_line_for_each_replica_in_the_order_of_their_ranks() -> None:
    held: Held[str] = Held()
    a, b = Replica("a"), Replica("b")
    for item, replica, rank, until in [("a2", a, 2, 5), ("b3", b, 3, 9), ("a1", a, 1, 7)]:
        held.add(item, replica, rank, until)
    assert held.next(lambda item, replica: True) == ("a1", a, 1)
    assert held.next(lambda item, replica: replica is b) == ("b3", b, 3)
    assert held.next(lambda item, replica: False) is None
    assert (held.waiting(a), held.waiting(b), len(held)) == (2, 1, 3)
    assert held.in_vain(now=4) is None
    assert held.in_vain(now=6) == "a2"
    for item in ("a1", "a2", "b3"):
        held.remove(item)
    assert (len(held), held.waiting(a), held.in_vain(now=99)) == (0, 0, None)


# --- the choice ----------------------------------------------------------------------------------


class Fleet:
    """Replicas, and one gateway's choice among them. Its time stands still unless told."""

    def __init__(self, replicas: int, gateways: int = 1, **more: Any) -> None:
        self.time = 0.0
        settings = {k: more.pop(k) for k in list(more) if k in RoutingConfig.model_fields}
        self.policy = CacheAware(RoutingConfig(**settings), self.now, **more)
        self.live = [
            FrontEnd(f"r{n}", "h", 1, Replica(f"r{n}", now=self.now)) for n in range(replicas)
        ]
        self.report(gateways=gateways)
        self.calls = 0

    def now(self) -> float:
        return self.time

    def report(self, **more: Any) -> None:
        for it in self.live:
            known = {"running": it.replica.inflight, "waiting": 0, "capacity": 64}
            known |= {"kv_cache_usage": 0.0, "prefix_cache_tokens": 100_000}
            it.replica.report(Load(**(known | more)))

    def send(self, prompt: Prompt, live: list[FrontEnd] | None = None) -> str:
        """Choose for a call that then stays; the replica."""
        self.calls += 1
        front_end = self.policy.choose(str(self.calls), prompt, live or self.live)
        front_end.began()
        return front_end.id

    def answer(self, prompt: Prompt, cached: int = 0, ttft_s: float = 0.1, live: Any = None) -> str:
        """Choose for a call, and let it come to its end."""
        id = self.send(prompt, live)
        self.end(prompt, cached, ttft_s)
        return id

    def end(self, prompt: Prompt, cached: int = 0, ttft_s: float = 0.1, id: str = "") -> None:
        id = id or str(self.calls)
        its = next(it for it in self.live if it.id == self.policy._sent[id].replica)
        self.time += ttft_s
        self.policy.first_byte(id)
        its.ended()
        self.policy.ended(id)
        self.policy.used(id, Usage(prompt.size // 4, cached, 100))


def text(name: str, kib: int, own: int = 0) -> Prompt:
    """A prompt of so many KiB; all but the last ``own`` are the same for a name."""
    own_blocks = tuple(f"{name}-{random.random()}".encode() for _ in range(own))
    return Prompt(blocks(name, kib - own) + own_blocks, kib * BLOCK)


def test_a_conversation_stays_where_it_is_cached_though_another_replica_has_less_to_do() -> None:
    fleet = Fleet(4)
    home = fleet.answer(text("a", 20))
    for n in range(3):
        next(it for it in fleet.live if it.id == home).began()
        assert fleet.answer(text("a", 21 + n)) == home
        assert fleet.policy.reason == "warm"
    assert fleet.answer(text("b", 20)) != home
    assert fleet.policy.reason == "cold"


def test_prompts_of_which_none_is_cached_are_spread_as_evenly_as_by_load() -> None:
    fleet = Fleet(4)
    went = Counter(fleet.send(text(str(n), 20)) for n in range(40))
    assert set(went.values()) == {10}


@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_a_prompt_that_all_have_in_common_is_soon_where_it_is_needed(replicas: int) -> None:
    """The failure of sglang#21199: one replica had it, and so got all of the load."""
    fleet = Fleet(replicas)
    went = Counter(fleet.send(text("system", 24, own=4)) for _ in range(20 * replicas))
    assert max(went.values()) <= 1.5 * 20 + 1
    # And it is computed no more than once on each of them.
    assert sum(it.cached == 0 for it in fleet.policy._sent.values()) == len(went)


def shared_by(fleet: Fleet, name: str, ids: str) -> None:
    """These replicas have the prompt of that name, of 20 KiB."""
    for id in ids.split():
        fleet.answer(text(name, 20), live=[it for it in fleet.live if it.id == id])


def home_of(name: str, ids: str, replicas: int = 4, own: int = 1) -> set[str]:
    """Where 12 requests go, one after the other, that share a prompt which some have; it is the
    same for another gateway."""
    went = set()
    for _ in range(2):
        fleet = Fleet(replicas)
        shared_by(fleet, name, ids)
        asked = [text(name, 20 + own, own) for _ in range(12)]
        went |= {fleet.answer(prompt, cached=20 * BLOCK // 4) for prompt in asked}
    return went


def test_what_two_have_is_asked_for_at_one_of_them_and_each_has_its_part() -> None:
    """Elsewhere it makes room for others."""
    homes = [home_of(name, "r0 r1") for name in "abcdefghijklmnop"]
    assert all(len(it) == 1 for it in homes)
    assert set.union(*homes) == {"r0", "r1"}


@pytest.mark.parametrize(
    ("ids", "replicas", "own"),
    [("r0 r1", 4, 30), ("r0 r1 r2", 4, 1), ("r0 r1", 2, 1)],
    ids=["the smaller part of the prompt", "most have it", "both have it"],
)
def test_what_is_everybodys_is_asked_for_where_least_is_to_do(
    ids: str, replicas: int, own: int
) -> None:
    """Else what all prompts begin with would send all new conversations to one replica."""
    assert home_of("a", ids, replicas, own) == set(ids.split())


def test_new_conversations_with_one_system_prompt_are_spread_evenly() -> None:
    fleet = Fleet(8)
    for it in fleet.live:
        fleet.answer(text("system", 24), live=[it])
    went = Counter(fleet.send(text("system", 28, own=4)) for _ in range(80))
    assert set(went.values()) == {10}


def test_a_home_with_much_to_do_is_relieved_by_another_that_has_the_prompt() -> None:
    (home,) = home_of("a", "r0 r1")
    fleet = Fleet(4)
    shared_by(fleet, "a", "r0 r1")
    at_home = [it for it in fleet.live if it.id == home]
    for busy in (False, True):
        id = fleet.answer(text("a", 20), cached=20 * BLOCK // 4)
        assert fleet.policy.reason == "warm"
        assert (id == home) != busy
        for n in range(3):
            fleet.send(text(f"b{n}", 1), at_home)


def test_a_conversation_stays_where_the_most_of_it_is() -> None:
    for name in "abcdefghijklmnop":
        fleet = Fleet(4)
        fleet.answer(text(name, 17), live=[fleet.live[0]])
        fleet.answer(text(name, 20), live=[fleet.live[1]])
        assert fleet.answer(text(name, 21)) == "r1"


@pytest.mark.parametrize(
    ("load", "moves"),
    [({}, True), ({"running": 2, "waiting": 1}, False), ({"kv_cache_usage": 0.9}, False)],
    ids=["room", "waits", "full"],
)
def test_a_prompt_moves_to_no_replica_that_lacks_room_itself(
    load: dict[str, Any], moves: bool
) -> None:
    """It would push out another prompt, which then moves too, until no replica has any."""

    def went(tokens_ahead: int) -> bool:
        fleet = Fleet(2)
        home = fleet.answer(text("a", 10))
        for it in fleet.live:
            for n in range(3):
                fleet.send(text(f"{it.id}{n}", 1), [it])
        fleet.report(**load)
        fleet.send(text("b", tokens_ahead // 256), [it for it in fleet.live if it.id == home])
        return fleet.send(text("a", 10)) != home

    assert not went(tokens_ahead=2_000)
    assert went(tokens_ahead=16_000) == moves  # 1.7 s; four times what its cache saves are 1.3
    assert went(tokens_ahead=60_000)  # longer than max_wait_for_cache_s


def test_while_its_home_has_no_room_a_prompt_has_one_more_home_for_all_gateways() -> None:
    def next_home(shared: int, live: slice, busy: str = "", full: str = "") -> str:
        fleet = Fleet(4)
        for it in fleet.live:  # what all prompts begin with
            fleet.answer(Prompt(blocks("a", shared), shared * BLOCK), live=[it])
        fleet.answer(text("a", 20), live=[fleet.live[0]])
        for it in fleet.live:
            for n in range(2 * (it.id == busy)):
                fleet.send(text(f"b{n}", 20), [it])
            if it.id == full:
                it.replica.report(
                    Load(it.replica.inflight, 0, 64, 0.9, prefix_cache_tokens=100_000)
                )
        it = fleet.send(text("a", 20), fleet.live[live])
        assert fleet.policy.reason == "overflow"
        return it

    for shared in (0, 4, 12):
        homes = {next_home(shared, slice(1, None)) for _ in range(8)}
        assert len(homes) == 1
    (home,) = homes
    assert next_home(12, slice(1, None), busy=home) != home
    assert next_home(12, slice(1, None), full=home) != home


def test_a_replica_that_comes_gets_its_part_of_what_everybody_sends() -> None:
    fleet = Fleet(8)
    before, new = fleet.live[:-1], fleet.live[-1]
    for it in before:
        fleet.answer(text("all", 10), live=[it])
    for _ in range(70):
        fleet.send(text("all", 10), before)
    assert fleet.send(text("all", 10)) == new.id
    fleet.policy.first_byte(str(fleet.calls))  # it has read that
    went = Counter(fleet.send(text("all", 10)) for _ in range(20))
    assert went[new.id] >= 8
    conversation = text("one", 40)
    home = fleet.answer(conversation, live=before)
    idle = FrontEnd("r9", "h", 1, Replica("r9", now=fleet.now))
    assert fleet.send(conversation, [*fleet.live, idle]) == home


@pytest.mark.parametrize(
    ("load", "moves"), [({}, False), ({"waiting": 1}, True), ({"kv_cache_usage": 0.9}, True)]
)
def test_conversations_stay_together_until_their_replica_lacks_room(
    load: dict[str, Any], moves: bool
) -> None:
    """Chance has put many on one replica; to compute one again costs more than a larger batch."""
    fleet = Fleet(4)
    crowd = [text(str(n), 20) for n in range(12)]
    for prompt in crowd:
        fleet.answer(prompt, live=[fleet.live[0]])
    for other in fleet.live:
        for n in range(4):
            fleet.send(text(f"{other.id}{n}", 20), [other])
    fleet.report(**load)
    went = {fleet.send(prompt) for prompt in crowd}
    assert (went != {"r0"}) == moves


@pytest.mark.parametrize(
    ("before", "prompt", "requests", "moves"),
    [
        ([(20, 4), (20, 4)], (20, 4), 10, False),
        ([(20, 10), (20, 10)], (20, 10), 10, False),
        ([(20, 4)], (20, 4), 10, True),
        ([(20, 4), (20, 4)], (20, 4), 14, True),
        ([(20, 12), (20, 12)], (20, 12), 10, True),
        ([(16, 0), (20, 0)], (24, 0), 10, True),
        ([(20, 0), (20, 0)], (24, 0), 10, True),
        ([(20, 0), (22, 0), (20, 0), (22, 0)], (22, 0), 10, True),
    ],
    ids=["the third of several", "half of it", "the second", "far more than others",
         "less than half", "a conversation", "sent again", "told again"],
)  # fmt: skip
def test_what_several_begin_with_stays_though_its_replica_lacks_room(
    before: list[tuple[int, int]], prompt: tuple[int, int], requests: int, moves: bool
) -> None:
    """It takes little room there. A conversation takes as much anywhere, and goes as a whole.

    Prompts are as many KiB in all, and of their own.
    """
    fleet = Fleet(4)
    for kib, own in before:
        fleet.answer(text("a", kib, own), live=[fleet.live[0]])
    for it in fleet.live:
        for n in range(requests if it.id == "r0" else 4):
            fleet.send(text(f"{it.id}{n}", 1), [it])
    fleet.report(kv_cache_usage=0.9)
    assert (fleet.send(text("a", *prompt)) != "r0") == moves
    assert fleet.policy.reason == ("overflow" if moves else "warm")


def test_a_call_goes_elsewhere_when_its_replica_has_much_more_to_read() -> None:
    fleet = Fleet(2, max_wait_for_cache_s=2.0)
    home = fleet.answer(text("a", 40))
    fleet.send(text("b", 300), [it for it in fleet.live if it.id == home])  # 10 s of work
    assert fleet.send(text("a", 40)) != home
    assert fleet.policy.reason == "overflow"


def test_a_call_waits_for_its_cache_as_long_as_that_is_worth_and_the_setting_allows() -> None:
    def stays(shared: int, ahead: int, **config: Any) -> bool:
        fleet = Fleet(2, **config)
        home = fleet.answer(text("a", shared))
        fleet.send(text("b", ahead), [it for it in fleet.live if it.id == home])
        return fleet.send(Prompt(blocks("a", shared), (shared + 4) * BLOCK)) == home

    assert stays(shared=20, ahead=80)
    assert not stays(shared=20, ahead=120)  # more than (1 + PATIENCE) times what it saves
    assert not stays(shared=20, ahead=80, max_wait_for_cache_s=0.1)
    assert stays(shared=20, ahead=120, patience=10)


def test_what_the_index_promises_counts_as_much_as_it_has_kept() -> None:
    """Another gateway's prompts push ours out of the cache: the index must not believe itself."""
    fleet = Fleet(2)
    [only, _] = fleet.live
    fleet.answer(text("a", 40), live=[only])
    believed = fleet.policy._seen[only.id].trusted
    for _ in range(100):
        fleet.answer(text("a", 40), cached=0, live=[only])
    assert (believed, fleet.policy._seen[only.id].trusted) == (1.0, pytest.approx(0.15, abs=0.05))
    fleet.send(text("a", 40), [only])
    assert fleet.policy._sent[str(fleet.calls)].cached == pytest.approx(10240 * 0.15, rel=0.4)
    fleet.end(text("a", 40))
    for _ in range(300):
        fleet.answer(text("a", 40), cached=10_240, live=[only])
    assert fleet.policy._seen[only.id].trusted > 0.95


def test_a_replicas_part_of_the_index_is_as_large_as_four_times_its_kv_cache() -> None:
    fleet = Fleet(2)
    [only, other] = fleet.live
    fleet.report(prefix_cache_tokens=10_000)
    for n in range(100):
        fleet.answer(text(f"b{n}", 40), live=[only])
    assert fleet.policy.index.blocks(only.id) == int(4 * 10_000 * 4 / BLOCK)
    fleet.report(prefix_cache_tokens=0)  # prefix caching is off
    fleet.answer(text("b", 40), live=[other])
    assert fleet.policy.index.blocks(other.id) == 0


def test_a_replica_that_dropped_its_cache_has_nothing() -> None:
    fleet = Fleet(2)
    home = fleet.answer(text("a", 20))
    fleet.report(cache_drops=1)
    fleet.answer(text("a", 20))
    assert fleet.policy.reason == "cold"
    fleet.report(cache_drops=1)
    fleet.answer(text("a", 20))
    assert fleet.policy.reason == "warm"
    assert home in {it.id for it in fleet.live}


def test_an_engine_without_prefix_caching_gets_calls_by_its_load_alone() -> None:
    fleet = Fleet(4)
    fleet.report(prefix_cache_tokens=0)
    went = Counter(fleet.send(text("a", 20)) for _ in range(40))
    assert set(went.values()) == {10}


def test_only_replicas_that_are_there_are_chosen_and_others_are_forgotten() -> None:
    fleet = Fleet(3)
    home = fleet.answer(text("a", 20))
    fleet.live = [it for it in fleet.live if it.id != home]
    next_home = fleet.answer(text("a", 20))
    assert next_home != home
    assert fleet.policy.reason == "overflow"  # it may come back
    fleet.policy.keep({it.id for it in fleet.live})
    assert fleet.answer(text("a", 20)) == next_home
    assert fleet.policy.reason == "warm"
    assert fleet.policy.replicas == 2
    assert home not in fleet.policy.index.replicas


def test_of_a_call_that_was_sent_twice_nothing_is_left_when_it_has_ended() -> None:
    fleet = Fleet(2)
    for live in ([fleet.live[0]], [fleet.live[1]]):
        fleet.policy.choose("1", text("a", 20), live)
        assert sum(it.backlog.tokens for it in fleet.policy._seen.values()) == 20 * BLOCK / 4
        fleet.policy.ended("1")
    fleet.policy.used("1", Usage(5000, 0, 10))
    assert not fleet.policy._sent
    for seen in fleet.policy._seen.values():
        assert (seen.backlog.tokens, seen.backlog._calls) == (0, {})


def test_what_another_gateway_has_sent_is_known() -> None:
    one, two = Fleet(8, gateways=2), Fleet(8, gateways=2)
    prompts = [text(str(n), 20) for n in range(64)]
    for it in prompts:
        home = one.answer(it)
        replica = next(at.replica for at in two.live if at.id == home)
        two.policy.heard(replica, it.blocks)
        assert two.answer(it) == home
        assert two.policy.reason == "warm"


def test_what_was_heard_of_a_replica_is_forgotten_with_it_and_with_its_cache() -> None:
    fleet = Fleet(3)
    for it in fleet.live:
        fleet.policy.heard(it.replica, blocks("a", 4))
    fleet.report(cache_drops=1)
    fleet.policy.heard(fleet.live[2].replica, blocks("b", 4))
    fleet.send(text("a", 4))
    assert fleet.policy.reason == "cold"
    assert fleet.policy.index.blocks("r2") <= 8 and fleet.policy.replicas == 3
    fleet.policy.keep({"r0"})
    assert set(fleet.policy.index.replicas) <= {"r0"}


def test_new_prompts_go_where_least_is_to_do_with_several_gateways_too() -> None:
    fleet = Fleet(8, gateways=2)
    spread = Counter(fleet.send(text(f"at once {n}", 20)) for n in range(160))
    assert set(spread.values()) == {20}
    assert fleet.policy.reason == "cold"


def test_a_session_stays_at_its_replica_whatever_it_sends() -> None:
    fleet = Fleet(8, session_affinity=True)
    went = {fleet.answer(Prompt(blocks(str(n), 20), 20 * BLOCK, session="s1")) for n in range(20)}
    assert len(went) == 1
    assert fleet.policy.reason == "session"
    others = {
        fleet.answer(Prompt(blocks(str(n), 20), 20 * BLOCK, session=str(n))) for n in range(50)
    }
    assert len(others) > 4


def test_a_replica_with_half_the_weight_gets_half_as_much() -> None:
    fleet = Fleet(3)
    slow = fleet.live[0].replica
    slow.weight = lambda now: 0.5  # type: ignore[method-assign]
    went = Counter(fleet.send(text(str(n), 20)) for n in range(100))
    assert 15 <= went["r0"] <= 22


def out(replica: Replica, now: float) -> None:
    """It has answered with errors."""
    replica.standing.out, replica.standing.since = 1, now + 30.0


def test_one_with_faults_widens_no_other_ones_bound() -> None:
    fleet = Fleet(4)
    fleet.live[3].replica.inflight = 5
    out(fleet.live[3].replica, fleet.now())
    went = Counter(fleet.send(text("a", 20, own=1)) for _ in range(60))
    assert max(went.values()) <= 1.5 * 21


@pytest.mark.parametrize("kind", ["warm", "session", "cold"])
def test_one_with_faults_gets_nothing_while_others_have_room(kind: str) -> None:
    """Its errors come at once, so it always has the fewest requests."""
    fleet = Fleet(4, gateways=2)
    prompts = [text(str(n), 20) for n in range(20)]
    if kind == "session":
        prompts = [replace(it, session=str(n)) for n, it in enumerate(prompts)]
    if kind == "warm":
        for it in prompts:
            fleet.answer(it)
    out(fleet.live[3].replica, fleet.now())
    for it in prompts:
        assert fleet.answer(it) != "r3"
    assert fleet.send(prompts[0], [fleet.live[3]]) == "r3"  # while there is no other


def test_a_prompt_of_less_than_a_block_goes_to_the_replica_with_the_least_to_do() -> None:
    fleet = Fleet(4)
    went = Counter(fleet.send(Prompt((), 200)) for _ in range(40))
    assert set(went.values()) == {10}
    assert fleet.policy.reason == "short"


def test_a_call_waits_for_a_place_where_it_is_cached_if_places_come_soon_or_are_used_anyway() -> (
    None
):
    fleet = Fleet(2)
    home = fleet.answer(text("a", 40))
    [full] = [it for it in fleet.live if it.id == home]
    rest = [it for it in fleet.live if it is not full]
    asks = text("a", 40)
    assert fleet.policy.waits_for(asks, rest, {full.replica: 0}) == (full.replica, 2.0)
    assert fleet.policy.waits_for(asks, rest, {full.replica: 1}) is None  # when is not known
    for _ in range(10):
        fleet.answer(asks, cached=10_000, live=[full])  # each takes 0.1 s
    assert fleet.policy.waits_for(asks, rest, {full.replica: 4}) == (full.replica, 2.0)
    assert fleet.policy.waits_for(asks, rest, {full.replica: 100}) is None
    assert fleet.policy.waits_for(text("new", 40), rest, {full.replica: 0}) is None
    assert fleet.policy.waits_for(Prompt((), 100), rest, {full.replica: 0}) is None


def test_a_call_waits_for_no_place_while_one_that_has_its_prompt_as_well_has_room() -> None:
    fleet = Fleet(3)
    for it in fleet.live:
        fleet.answer(text("a", 40), live=[it])
    full, *rest = fleet.live
    for it in rest:
        fleet.send(text("b", 40), [it])  # they have more to do, and room for more
    assert fleet.policy.waits_for(text("a", 40), rest, {full.replica: 0}) is None
    everywhere = {it.replica: 0 for it in fleet.live[:2]}
    assert fleet.policy.waits_for(text("a", 40), fleet.live[2:], everywhere) is None
    fleet.policy.index.clear("r1")
    fleet.policy.index.clear("r2")
    wait = fleet.policy.waits_for(text("a", 40), rest, {full.replica: 0})
    assert wait == (full.replica, 2.0)


def test_bytes_per_token_come_from_the_accounting() -> None:
    """A prompt of so many bytes is 1 token each in one language and 1/4 in another."""
    fleet = Fleet(2)
    for _ in range(100):
        prompt = text("a", 20)
        fleet.send(prompt)
        fleet.policy.used(str(fleet.calls), Usage(prompt.size, 0, 10))
    fleet.send(text("b", 20))
    uncached = max(it.backlog.tokens for it in fleet.policy._seen.values())
    assert uncached == pytest.approx(20 * BLOCK, rel=0.05)


def test_a_prompt_that_is_answered_many_times_does_not_shrink_the_index() -> None:
    """An engine counts the prompt for each of ``n`` answers."""
    fleet = Fleet(2)
    sizes = []
    for n, copies in ((1, 8), (128, 128), (1, 128)):  # the last: told nowhere that is looked at
        prompt = prompt_of(said(LONG * 8, n=n))
        for _ in range(200):
            fleet.send(prompt)
            usage = Usage(prompt.size // 4 * copies, 0, 10)
            fleet.policy.used(str(fleet.calls), usage)
        sizes.append(fleet.policy._bytes_per_token.value)
    assert sizes == [pytest.approx(it, rel=0.05) for it in (1.0, 4.0, 1.0)]


def test_prompts_whose_text_is_not_known_tell_nothing_of_the_bytes_of_a_token() -> None:
    """Such as embeddings: the text of all of them together is nothing."""
    fleet = Fleet(2)
    for _ in range(100):
        fleet.send(Prompt((), 0))
        fleet.policy.used(str(fleet.calls), Usage(1000, 0, 10))
    fleet.send(text("b", 20))
    uncached = max(it.backlog.tokens for it in fleet.policy._seen.values())
    assert uncached == 20 * BLOCK / 4


# --- settings ------------------------------------------------------------------------------------


def test_the_settings_say_what_to_change() -> None:
    for settings, args in ((GatewayConfig, {}), (ModelConfig, {"model": "org/m"})):
        with pytest.raises(ConfigError, match="did you mean 'policy'"):
            parse(settings, {**args, "routing": {"polcy": "least_loaded"}}, "args")
        with pytest.raises(ConfigError, match=r"routing.policy is 'random', but .*round_robin"):
            parse(settings, {**args, "routing": {"policy": "random"}}, "args")
        with pytest.raises(ConfigError, match=r"routing.max_wait_for_cache_s"):
            parse(settings, {**args, "routing": {"max_wait_for_cache_s": -1}}, "args")
