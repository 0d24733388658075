"""What front ends report to gateways, and what the ledger makes of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from harness.processes import free_port
from harness.scripted import until
from starlette.responses import PlainTextResponse

from serve_app.cluster.credential import CREDENTIAL_HEADER
from serve_app.cluster.exchange import (
    CALL_HEADER,
    PROMPT_HEADER,
    Answer,
    Called,
    Load,
    Question,
    Report,
    Usage,
)
from serve_app.gateway import exchange as gateway_exchange
from serve_app.gateway import ledger
from serve_app.gateway.exchange import Exchange
from serve_app.gateway.ledger import Entry, Ledger
from serve_app.gateway.relay import Request
from serve_app.gateway.replicas import Board
from serve_app.gateway.stages import Call, Outcome
from serve_app.replica import reports
from serve_app.replica.guard import Guard
from serve_app.replica.prompts import KEPT, KEPT_S, Prompts
from serve_app.replica.reports import Reports

CALLED = Called("1", "g", "team-a", "m", "alias", "/v1/completions", 12.0)
TOOK = Usage(5, 2, 7)


def report(id: str, gateway: str = "g") -> Report:
    return Report(replace(CALLED, id=id, gateway=gateway), TOOK)


def test_messages_arrive_as_they_were_sent() -> None:
    answer = Answer("p", 3, [report("1"), Report(CALLED, None)], Load(1, 2, 3, 0.5))
    assert Answer.decode(answer.encode()) == answer
    assert Called.read(CALLED.header()) == CALLED
    odd = replace(CALLED, key="é", path='/v1/responses/"\n世')
    assert Called.read(odd.header()) == odd and b"\n" not in odd.header()
    answer = Answer("p", 3, prompts=["bm90=", ""], heard=7)
    assert Answer.decode(answer.encode()) == answer
    question = Question("g", "p", 3, 2, heard=7)
    assert Question.decode(question.encode()) == question


async def test_a_report_stays_until_it_was_taken() -> None:
    kept = Reports(lambda: Load(1, 0, 8, 0.1))
    for id in ("1", "2"):
        kept.add(report(id))
    first = await kept.answer(Question("g"))
    assert [it.called.id for it in first.reports] == ["1", "2"]
    assert first.load == Load(1, 0, 8, 0.1)
    again = await kept.answer(Question("g"))  # the answer was lost
    assert again.reports == first.reports
    kept.add(report("3"))
    last = await kept.answer(Question("g", first.of, first.last))
    assert [it.called.id for it in last.reports] == ["3"]
    assert kept.due == 1


async def test_a_gateway_is_told_of_what_others_have_sent_and_once() -> None:
    kept = Reports(lambda: Load(1, 0, 8, 0.1))
    for gateway, key in (("g", "mine"), ("other", "a"), ("third", "b"), ("g", "mine too")):
        kept.prompts.add(gateway, key)
    kept.add(report("1"))
    first = await kept.answer(Question("g", heard=0))
    assert first.prompts == ["a", "b"]
    assert (await kept.answer(Question("g", heard=0))).prompts == ["a", "b"]  # that one was lost
    kept.prompts.add("other", "c")
    then = await kept.answer(Question("g", first.of, heard=first.heard))
    assert then.prompts == ["c"]
    again = await kept.answer(Question("g", "the one before", heard=500))
    assert again.prompts == ["a", "b", "c"]  # the front end was started again
    kept.add(report("2", "new"))
    new = await kept.answer(Question("new", heard=0))
    assert new.prompts == ["mine", "a", "b", "mine too", "c"]
    kept.add(report("3", "of an earlier version"))
    assert (await kept.answer(Question("of an earlier version"))).prompts == []
    kept.sent("g", "d")
    timers = {id: box.soon is not None for id, box in kept._boxes.items()}
    assert timers == {"g": False, "new": True, "of an earlier version": False}


async def test_a_question_that_was_broken_off_takes_nothing_from_the_next_one() -> None:
    """A front end goes on with it: its server does not see that the connection has ended."""
    kept = Reports(lambda: Load(0, 0, 8, 0.0))
    kept.add(report("1"))
    first = await kept.answer(Question("g", heard=0))
    question = Question("g", first.of, first.last, heard=first.heard, soon_s=0.01)
    broken_off, asked = (asyncio.create_task(kept.answer(question)) for _ in range(2))
    await asyncio.sleep(0.05)
    kept.sent("other", "a")
    assert (await asyncio.wait_for(asked, 0.5)).prompts == ["a"]
    last = await asyncio.wait_for(broken_off, 0.5)
    assert (last.of, last.last, last.heard, last.prompts) == (first.of, first.last, 0, [])


def test_prompts_are_forgotten_with_the_cache_and_their_numbers_go_on() -> None:
    kept = Prompts()
    for key in ("a", "b"):
        kept.add("other", key)
    kept.forget()
    assert kept.after(0, "g") == []
    kept.add("other", "c")
    assert kept.after(2, "g") == ["c"] and kept.last == 3


async def test_what_others_have_sent_is_told_though_the_engine_is_another_front_ends(
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(reports, "HOLD_S", 0.001)
    monkeypatch.setattr(reports, "IDLE_HOLD_S", float("inf"))
    kept = Reports(lambda: None)
    first = await kept.answer(Question("g"))
    asked = asyncio.create_task(kept.answer(Question("g", first.of, heard=first.heard)))
    await asyncio.sleep(0.05)
    assert not asked.done()  # it holds a gateway that knows all
    kept.sent("other", "a")
    assert (await asked).prompts == ["a"]


async def test_what_others_have_sent_is_told_within_the_time_that_a_gateway_says(
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(reports, "HOLD_S", 60.0)
    kept = Reports(lambda: Load(1, 0, 8, 0.1))
    kept.tell_now()
    kept.add(report("1"))
    first = await kept.answer(Question("g"))
    question = Question("g", first.of, first.last, heard=first.heard, soon_s=0.05)
    for key in ("a", "b"):  # the second time the first one is known
        asked = asyncio.create_task(kept.answer(question))
        await asyncio.sleep(0)
        kept.sent("g", "mine")
        await asyncio.sleep(0.1)
        assert not asked.done()
        kept.sent("other", key)
        kept.sent("other", key + "2")
        answer = await asyncio.wait_for(asked, 5)
        assert answer.prompts == [key, key + "2"]
        question = replace(question, of=answer.of, heard=answer.heard)
    kept.sent("other", "c")  # while it does not ask
    await asyncio.sleep(0.1)
    assert (await asyncio.wait_for(kept.answer(question), 5)).prompts == ["c"]


def test_a_gateway_is_told_sooner_by_few_front_ends_than_by_many() -> None:
    assert gateway_exchange.soon_s(4) == gateway_exchange.soon_s(20) == 0.1
    assert gateway_exchange.soon_s(100) == 0.5  # 200 answers a second, of all together


def test_old_prompts_and_the_first_of_too_many_are_told_no_more() -> None:
    at = [0.0]
    kept = Prompts(lambda: at[0])
    kept.add("other", "old")
    at[0] += KEPT_S
    kept.add("other", "new")
    assert kept.after(0, "g") == ["old", "new"]
    at[0] += 1
    assert kept.after(0, "g") == ["new"]
    for n in range(3):
        kept.add("other", str(n) * (KEPT // 2))
    assert [it[0] for it in kept.after(0, "g")] == ["1", "2"]
    assert kept.after(4, "g") == kept.after(3, "g")[1:] and kept.after(5, "g") == []


async def test_numbers_of_another_process_take_nothing() -> None:
    """A front end was started again, on the same port."""
    kept = Reports(lambda: None)
    kept.add(report("1"))
    answer = await kept.answer(Question("g", "the one before", 500))
    assert [it.called.id for it in answer.reports] == ["1"]


async def test_a_question_without_news_is_answered_in_the_end(monkeypatch: Any) -> None:
    monkeypatch.setattr(reports, "HOLD_S", 0.05)
    kept = Reports(lambda: None)
    assert (await kept.answer(Question("g", waiting=3))).reports == []
    assert kept.waiting == 3
    asked = asyncio.create_task(kept.answer(Question("g")))
    await asyncio.sleep(0)
    kept.add(report("1"))
    assert len((await asked).reports) == 1


async def test_a_gateway_that_knows_that_an_engine_idles_is_answered_once_it_does_not(
    monkeypatch: Any,
) -> None:
    """Most replicas of a large fleet idle, and each answer costs every gateway."""
    monkeypatch.setattr(reports, "HOLD_S", 0.001)
    monkeypatch.setattr(reports, "IDLE_HOLD_S", float("inf"))
    idle, busy = Load(0, 0, 8, 0.0), Load(1, 0, 8, 0.1)
    loads = [busy, *[idle] * 9]
    kept = Reports(lambda: loads.pop() if len(loads) > 1 else busy)
    first = await kept.answer(Question("g"))  # which knows nothing yet
    assert first.load == idle
    again = await kept.answer(Question("g", first.of, first.last))
    assert again.load == busy
    # A busy engine is told of all the time, and one that calls wait for.
    assert (await kept.answer(Question("g", first.of, first.last))).load == busy
    loads[:] = [busy, *[idle] * 9]
    assert (await kept.answer(Question("g", first.of, first.last))).load == idle
    told = await kept.answer(Question("g", first.of, first.last, waiting=1))
    assert told.load == idle


async def test_front_ends_that_are_asked_in_the_same_moment_answer_in_different_ones(
    monkeypatch: Any,
) -> None:
    """A thousand answers at once keep a gateway from its streams for 0.1 s."""
    holds: list[float] = []

    def timeout(seconds: float) -> Any:
        holds.append(round(seconds, 3))
        return asyncio.timeout(0)

    named = {name: getattr(asyncio, name) for name in ("Event", "sleep")}
    monkeypatch.setattr(reports, "asyncio", SimpleNamespace(timeout=timeout, **named))
    monkeypatch.setattr(reports, "HOLD_S", 1.0)
    for _ in range(20):
        await Reports(lambda: Load(1, 0, 8, 0.1)).answer(Question("g"))
    assert len(holds) == 20 and len({*holds}) > 10
    assert min(holds) > 0.7 and max(holds) < 1.3


async def test_reports_of_a_gateway_that_is_gone_go_to_another(monkeypatch: Any) -> None:
    monkeypatch.setattr(reports, "HOLD_S", 0.01)
    kept = Reports(lambda: None)
    kept.add(report("1", "gone"))
    assert (await kept.answer(Question("g"))).reports == []
    monkeypatch.setattr(reports, "SILENT_S", -1.0)
    assert kept.due == 0  # nobody is about to take it: a drain need not wait
    answer = await kept.answer(Question("g"))
    assert [it.called.id for it in answer.reports] == ["1"]


async def test_a_gateway_that_comes_back_after_long_silence_takes_nothing_unseen(
    monkeypatch: Any,
) -> None:
    """Its reports went to another one meanwhile, and new ones have come since."""
    monkeypatch.setattr(reports, "HOLD_S", 0.01)
    kept = Reports(lambda: None)
    for id in ("1", "2", "3"):
        kept.add(report(id))
    seen = await kept.answer(Question("g"))
    with monkeypatch.context() as long_silence:
        long_silence.setattr(reports, "SILENT_S", -1.0)
        await kept.answer(Question("another"))
    kept.add(report("4"))
    answer = await kept.answer(Question("g", seen.of, seen.last))
    assert [it.called.id for it in answer.reports] == ["4"]


# --- the ledger ----------------------------------------------------------------------------------


class Listener:
    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def entered(self, entry: Entry) -> None:
        self.entries.append(entry)


@pytest.fixture
def heard() -> Listener:
    return Listener()


@pytest.fixture
def book(heard: Listener) -> Ledger:
    book = Ledger()
    book.listen(heard)
    return book


def call(id: str = "1") -> Call:
    model: Any = type("Model", (), {"name": "m"})
    request = Request(f"r-{id}", "POST", "/v1/completions", b"", [], b"{}")
    return Call(id, request, model, "alias", None, arrived=1.0)


def outcome(front_end: str = "f") -> Outcome:
    return Outcome("answered", 200, front_end=front_end, first_byte=1.5, ended=3.0)


@pytest.mark.parametrize("first", ["the answer ends", "the report comes"])
async def test_an_entry_has_both_halves(book: Ledger, heard: Listener, first: str) -> None:
    await book.admit(call())
    if first == "the report comes":
        book.report(report("1"), "f")
    book.ended(call(), outcome())
    if first == "the answer ends":
        assert heard.entries == []
        book.report(report("1"), "f")
    [entry] = heard.entries
    assert (entry.id, entry.request_id, entry.model_id) == ("1", "r-1", "alias")
    assert (entry.usage, entry.status, entry.first_byte_s, entry.duration_s) == (
        TOOK, 200, 0.5, 2.0,
    )  # fmt: skip


async def test_a_refused_call_waits_for_no_report(book: Ledger, heard: Listener) -> None:
    await book.admit(call())
    book.ended(call(), Outcome("refused", 429, ended=1.0))
    [entry] = heard.entries
    assert (entry.end, entry.usage) == ("refused", None)


async def test_a_call_that_two_replicas_had_counts_once(book: Ledger, heard: Listener) -> None:
    await book.admit(call())
    book.report(Report(CALLED, Usage(5, 0, 0)), "the first")
    book.ended(call(), outcome("the second"))
    assert heard.entries == []
    book.report(report("1"), "the second")
    assert [it.usage for it in heard.entries] == [TOOK]


async def test_a_lost_replica_reports_nothing(
    book: Ledger, heard: Listener, monkeypatch: Any
) -> None:
    monkeypatch.setattr(ledger, "PATIENCE_S", 0.01)
    await book.admit(call())
    book.ended(call(), outcome())
    await asyncio.sleep(0.05)
    assert [it.usage for it in heard.entries] == [None]


async def test_what_an_engine_still_works_on_is_waited_for(
    book: Ledger, heard: Listener, monkeypatch: Any
) -> None:
    """A response that is made in the background."""
    monkeypatch.setattr(ledger, "PATIENCE_S", 0.01)
    await book.admit(call())
    book.ended(call(), outcome())
    book.report(Report(CALLED, None), "f")
    await asyncio.sleep(0.05)
    assert heard.entries == []
    book.report(report("1"), "f")
    assert [it.usage for it in heard.entries] == [TOOK]


async def test_what_a_lost_front_end_still_worked_on_is_entered_without_a_report(
    book: Ledger, heard: Listener, monkeypatch: Any
) -> None:
    monkeypatch.setattr(gateway_exchange, "_LOOK_S", 0.01)
    monkeypatch.setattr(gateway_exchange, "_PAUSE_S", 0.01)
    await book.admit(call())
    book.ended(call(), outcome())
    book.report(Report(CALLED, None), "f")
    board = Board()
    board.publish("m", {"f": ("127.0.0.1", free_port())})
    asking = asyncio.create_task(Exchange(board, book, b"").run())
    await asyncio.sleep(0.1)
    assert heard.entries == []  # it is silent, and may come back
    board.publish("m", {})
    assert await until(lambda: [it.usage for it in heard.entries] == [None])
    asking.cancel()


async def test_what_another_gateway_sends_to_a_front_end_is_heard(book: Ledger) -> None:
    port, kept = free_port(), Reports(lambda: Load(0, 0, 8, 0.0))
    guard = Guard(PlainTextResponse("ok"), b"secret", kept, lambda: False, lambda: False)
    server = uvicorn.Server(uvicorn.Config(guard, port=port, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    board, told = Board(), list[tuple[str, str, str]]()
    board.heard = lambda model, replica, key: told.append((model, replica.id, key))
    board.publish("m", {"f": ("127.0.0.1", port)})
    assert await until(lambda: server.started)
    asking = asyncio.create_task(Exchange(board, book, b"secret").run())
    [front_end] = board.live("m")
    assert await until(lambda: front_end.replica.load is not None)
    headers = {CREDENTIAL_HEADER: b"secret", PROMPT_HEADER: b"a2V5IDEyMw=="}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for gateway in ("other", gateway_exchange.GATEWAY):
            called = replace(CALLED, gateway=gateway).header()
            answer = await client.get("/", headers=headers | {CALL_HEADER: called})
            assert answer.text == "ok"
        refused = await client.get("/", headers=headers | {CREDENTIAL_HEADER: b"guessed"})
        assert refused.status_code == 401
    assert await until(lambda: bool(told))
    assert told == [("m", "f", "a2V5IDEyMw==")]
    assert kept.prompts.last == 2  # its own is for the other one
    asking.cancel()
    server.should_exit = True
    await serving


class _Told(Exchange):
    """Asks no front end: it is given these answers."""

    def __init__(self, board: Board, book: Ledger, *answers: Answer) -> None:
        super().__init__(board, book, b"")
        self.answers = list(answers)
        self.questions: list[Question] = []

    async def _once(self, front_end: Any, question: Question) -> Answer:
        self.questions.append(question)
        if not self.answers:
            await asyncio.Event().wait()
        return self.answers.pop(0)


async def test_what_others_have_sent_waits_until_it_is_known_how_much_a_replica_keeps(
    book: Ledger,
) -> None:
    """Else most of it would be forgotten at once, or all: it has dropped its cache before."""
    board, told = Board(), list[str]()
    board.heard = lambda model, replica, key: told.append(key)
    board.publish("m", {"f": ("127.0.0.1", 1)})
    load = Load(0, 0, 8, 0.0, prefix_cache_tokens=10**6, cache_drops=3)
    exchange = _Told(
        board, book, Answer("x", 0, prompts=["a"], heard=1),
        Answer("x", 0, load=load, prompts=["a", "b"], heard=2),
    )  # fmt: skip
    asking = asyncio.create_task(exchange.run())
    assert await until(lambda: len(exchange.questions) == 3)
    assert [it.heard for it in exchange.questions] == [0, 0, 2]
    assert told == ["a", "b"]
    asking.cancel()


async def test_what_was_told_counts_once_though_the_next_question_is_broken_off(
    book: Ledger, heard: Listener
) -> None:
    board, told = Board(), list[str]()
    board.heard = lambda model, replica, key: told.append(key)
    board.publish("m", {"f": ("127.0.0.1", 1)})
    sleeps = Load(0, 0, 8, 0.0, asleep=True, wakes=True)
    exchange = _Told(board, book, Answer("x", 1, [report("9", "gone")], sleeps, ["a"], 1))
    asking = asyncio.create_task(exchange.run())
    assert await until(lambda: len(exchange.questions) == 2)
    for number in range(3, 6):
        board.wanted("m")
        assert await until(lambda n=number: len(exchange.questions) == n)  # type: ignore[misc]
    assert len(heard.entries) == 1 and told == ["a"]
    asking.cancel()


async def test_a_gateway_that_ends_waits_for_reports(book: Ledger, heard: Listener) -> None:
    for id in ("1", "2"):
        await book.admit(call(id))
    await book.settle(10)  # both still run
    book.ended(call("1"), outcome())
    settling = asyncio.create_task(book.settle(10))
    await asyncio.sleep(0)
    assert not settling.done()
    book.report(report("1"), "f")
    await settling
    assert len(heard.entries) == 1


async def test_an_orphan_is_entered_as_its_front_end_knows_it(
    book: Ledger, heard: Listener
) -> None:
    book.report(report("9", "gone"), "f")
    [entry] = heard.entries
    assert (entry.end, entry.key, entry.model_id, entry.usage) == (
        "orphaned", "team-a", "alias", TOOK,
    )  # fmt: skip


@pytest.mark.parametrize("number", ["-7", "1" + "0" * 400, "1e999", "NaN"])
@pytest.mark.parametrize("name", ["running", "capacity", "gateways", "prefix_cache_tokens"])
def test_a_load_that_cannot_be_is_refused(name: str, number: str) -> None:
    """A capacity of 400 digits made each request to the model fail, its healthy replicas too."""
    said = Answer("it", 1, load=Load(5, 5, 5, 0.5, gateways=5, prefix_cache_tokens=5)).encode()
    assert Answer.decode(said).load
    with pytest.raises(ValueError):
        Answer.decode(said.replace(f'"{name}":5'.encode(), f'"{name}":{number}'.encode()))
