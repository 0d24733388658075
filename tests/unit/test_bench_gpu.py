"""The parts of ``benchmarks.h200`` that need no GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.h200 import first_tokens, front_ends

TOKENS_PER_S = {"bare-1": 5000.0, "ours-4": 6000.0, "litellm": 800.0}


@pytest.mark.parametrize("attempt", range(5))  # the order is random
def test_a_round_that_is_cut_has_what_was_measured_and_slow_ones_come_last(
    attempt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: Any = {n: SimpleNamespace(port=port) for port, n in enumerate(TOKENS_PER_S)}
    asked: list[tuple[str, int, int]] = []

    def wrk(port: int, folder: Path, clients: int, *args: Any) -> dict[str, float]:
        name = list(TOKENS_PER_S)[port]
        if clients == 256 and name == "litellm":
            raise SystemExit("out of time")
        asked.append((name, clients, args[-1]))
        return {"tokens_per_s": TOKENS_PER_S[name]}

    monkeypatch.setattr(front_ends, "_wrk", wrk)
    monkeypatch.setattr(first_tokens, "measure", lambda *_: {"bare-1": {"ttft_ms": [1, 2, 3]}})
    found: dict[str, Any] = {name: {} for name in servers}
    with pytest.raises(SystemExit):
        front_ends._play(found, servers, {64: 1.0, 256: 1.0}, Path(), words=False)
    assert found["c1"] == {"bare-1": {"ttft_ms": [1, 2, 3]}}
    assert [sorted(found[name]) for name in TOKENS_PER_S] == [["c256", "c64"]] * 2 + [["c64"]]
    assert len(asked) == 5, "the slow one's second load was not the last"
    assert {waves for _, _, waves in asked} == {2}
