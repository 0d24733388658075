"""Messages between two processes of a replica, over a pipe, handled on each one's event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

logger = logging.getLogger("ray.serve")


class Lost(Exception):
    """The other process has ended, or this one has closed the channel."""


class Failed(Exception):
    """The other process did not answer: what went wrong there, in words."""


class Channel:
    """One end. Messages arrive in the order in which the other end sent them.

    Each is handled before the next one is read, except where its handler is a coroutine function.
    """

    def __init__(
        self,
        connection: Connection[Any, Any],
        handlers: Mapping[str, Callable[..., Any]],
        lost: Callable[[], None],
    ) -> None:
        """Start to read, on the running event loop.

        Args:
            handlers: by the message's name. What one returns, also by a coroutine, is the answer.
            lost: called once, when the other end is gone.
        """
        self._connection = connection
        self._handlers = handlers
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = True
        self._loop.add_reader(connection.fileno(), self._read)

    def tell(self, name: str, *args: Any) -> None:
        """Send a message that needs no answer. Nothing happens where the other end is gone."""
        self._send((name, None, args))

    async def ask(self, name: str, *args: Any) -> Any:
        """Send a message and return its answer.

        Raises:
            Lost: there will be none.
            Failed: the handler raised.
        """
        if not self._open:
            raise Lost
        number = next(self._numbers)
        future = self._asked[number] = self._loop.create_future()
        self._send((name, number, args))
        try:
            return await future
        finally:
            self._asked.pop(number, None)

    def close(self) -> None:
        """End the channel; those who wait for an answer get :class:`Lost`."""
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._connection.fileno())
        self._connection.close()
        for future in self._asked.values():
            if not future.done():
                future.set_exception(Lost())

    def _send(self, message: Any) -> None:
        if self._open:
            try:
                self._connection.send(message)
            except OSError:
                self._end()

    def _read(self) -> None:
        try:
            name, number, args = self._connection.recv()
        except (EOFError, OSError):
            self._end()
            return
        if name in (_ANSWER, _FAILURE):
            future = self._asked.get(number)
            if future is None or future.done():
                return
            if name == _ANSWER:
                future.set_result(*args)
            else:
                future.set_exception(Failed(*args))
            return
        try:
            answer = self._handlers[name](*args)
        except Exception as error:
            self._fail(name, number, error)
            return
        if asyncio.iscoroutine(answer):
            task = self._loop.create_task(self._answer(name, number, answer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif number is not None:
            self._send((_ANSWER, number, (answer,)))

    async def _answer(self, name: str, number: int | None, answer: Any) -> None:
        try:
            result = await answer
        except Exception as error:
            self._fail(name, number, error)
            return
        if number is not None:
            self._send((_ANSWER, number, (result,)))

    def _fail(self, name: str, number: int | None, error: Exception) -> None:
        """Whoever asked must not wait for ever. Not every exception can be pickled."""
        logger.error(f"a message '{name}' of another front end failed", exc_info=error)
        if number is not None:
            self._send((_FAILURE, number, (f"{type(error).__name__}: {error}",)))

    def _end(self) -> None:
        if self._open:
            self.close()
            self._lost()


_ANSWER, _FAILURE = "answer", "failure"
