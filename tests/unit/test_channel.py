"""Messages between a replica's processes; here both ends are in one."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest

from serve_app.replica.channel import Channel, Failed, Lost


class End:
    def __init__(self, connection: Any, **handlers: Callable[..., Any]) -> None:
        self.heard: list[Any] = []
        self.lost = 0
        self.channel = Channel(connection, {"hear": self.heard.append, **handlers}, self._lose)

    def _lose(self) -> None:
        self.lost += 1


def ends(**handlers: Callable[..., Any]) -> tuple[End, End]:
    """Two; the second one has the handlers."""
    one, other = multiprocessing.Pipe()
    return End(one), End(other, **handlers)


async def test_messages_come_in_order_and_answers_after_what_was_told_before() -> None:
    one, other = ends(double=lambda number: 2 * number)

    async def slow(number: int) -> int:
        await asyncio.sleep(0.05)
        other.channel.tell("hear", f"before {number}")
        return number

    other.channel._handlers = {**other.channel._handlers, "slow": slow}
    asked = asyncio.create_task(one.channel.ask("slow", 3))
    for number in range(100):
        one.channel.tell("hear", number)
    assert await one.channel.ask("double", 21) == 42  # it does not wait for the slow one
    assert other.heard == list(range(100))
    assert await asked == 3
    assert one.heard == ["before 3"]
    one.channel.close()
    other.channel.close()


async def test_large_messages_come_whole() -> None:
    one, other = ends(same=lambda data: data)
    data = bytes(50_000)
    assert await one.channel.ask("same", data) == data
    one.channel.close()
    other.channel.close()


async def test_the_end_of_the_other_process_is_told_once_and_to_all_who_wait() -> None:
    one, other = ends(never=lambda: asyncio.Event().wait())
    asked = [asyncio.create_task(one.channel.ask("never")) for _ in range(3)]
    await asyncio.sleep(0.05)
    other.channel.close()
    for task in asked:
        with pytest.raises(Lost):
            await task
    one.channel.tell("hear", "nobody hears it")
    with pytest.raises(Lost):
        await one.channel.ask("never")
    assert (one.lost, other.lost) == (1, 0)


async def test_who_asks_what_the_other_end_fails_at_is_told_so() -> None:
    class Unpicklable(Exception):
        def __init__(self, why: str, more: object) -> None:
            super().__init__(why, more)

    def fail(why: str) -> None:
        raise Unpicklable(why, lambda: None)

    async def fail_later(why: str) -> None:
        await asyncio.sleep(0)
        raise OSError(why)

    one, other = ends(fail=fail, fail_later=fail_later)
    async with asyncio.timeout(5):
        with pytest.raises(Failed, match=r"Unpicklable: .*no space"):
            await one.channel.ask("fail", "no space")
        with pytest.raises(Failed, match="OSError: no space"):
            await one.channel.ask("fail_later", "no space")
        one.channel.tell("fail", "nobody asked")
        one.channel.tell("hear", "and it goes on")
        assert await one.channel.ask("hear", "") is None
    assert other.heard == ["and it goes on", ""]
    one.channel.close()
    other.channel.close()
