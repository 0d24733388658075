"""Counts what engines do for each HTTP request: the tokens that users pay for.

vLLM's statistics of finished requests name no request and leave out aborted ones. So the meter
looks at what the output processor keeps of each request in the engine (its ``RequestState``): it
enters a dict when it is added, within the HTTP request that asked for it, and leaves it when it has
ended in whatever way. One HTTP request has several of them for several prompts or ``n``.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Any

from serve_app.cluster.exchange import Called, Report, Usage
from serve_app.replica.reports import Reports


class Meter:
    """What one HTTP request took so far."""

    def __init__(self, called: Called, reports: Reports) -> None:
        self.called = called
        self._reports = reports
        self._open = 1  # the HTTP request itself
        self._prompt = self._cached = self._completion = 0

    def began(self) -> None:
        """A request was added to the engine."""
        self._open += 1

    def took(self, state: Any) -> None:
        """A request has left the engine, finished or aborted; ``state`` is vLLM's of it."""
        if not state.is_prefilling:  # vLLM counts a prompt once it has been computed
            self._prompt += state.prompt_len
            self._cached += state.num_cached_tokens
        if state.stats is not None:
            self._completion += state.stats.num_generation_tokens
        elif state.detokenizer is not None:  # statistics are off
            self._completion += state.detokenizer.num_output_tokens()
        self._end_one()

    def answered(self) -> None:
        """The HTTP request has ended. What is aborted with it leaves the engine a moment later."""
        self._end_one()
        if self._open:
            asyncio.get_running_loop().call_later(1.0, self._still_open)

    def _still_open(self) -> None:
        if self._open:
            self._reports.add(Report(self.called, None))

    def _end_one(self) -> None:
        self._open -= 1
        if not self._open:
            usage = Usage(self._prompt, self._cached, self._completion)
            self._reports.add(Report(self.called, usage))


current: ContextVar[Meter | None] = ContextVar("meter", default=None)
"""That of the HTTP request in whose task, or a child of it, this runs."""


class States(dict[str, Any]):
    """In place of ``OutputProcessor.request_states``: tells meters what enters and leaves."""

    def __init__(self) -> None:
        super().__init__()
        self._meters: dict[str, Meter] = {}

    def __setitem__(self, id: str, state: Any) -> None:
        if meter := current.get():
            meter.began()
            self._meters[id] = meter
        super().__setitem__(id, state)

    def pop(self, id: str, *default: Any) -> Any:
        state = super().pop(id, *default)
        if meter := self._meters.pop(id, None):
            meter.took(state)
        return state


def install(llm: Any) -> None:
    """Meter all requests of an engine from now on. It must have none yet."""
    assert not llm.output_processor.request_states
    llm.output_processor.request_states = States()
