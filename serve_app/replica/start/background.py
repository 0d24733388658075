"""A background thread, for work while vLLM's constructor blocks the event loop."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class BackgroundThread(ABC):
    """Runs :meth:`_run` in a thread of its own while its ``with`` block runs."""

    def __init__(self, name: str) -> None:
        self._over = threading.Event()
        """Set when the block has ended."""

        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join(timeout=5)

    @abstractmethod
    def _run(self) -> None:
        """The thread's work. It must return soon after ``_over`` is set."""
