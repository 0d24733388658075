"""What is in a GPU's memory, as vLLM measured it when the engine started.

vLLM tells these numbers in its log alone, in the process of each worker; the plugin keeps the
lines. On a CPU, and with ``kv_cache_memory_bytes``, vLLM measures nothing; of a part of a GPU the
driver knows what its process holds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from serve_app.planner.hardware import GIB

LINES = ("Model loading took", "Free memory on device")
"""How the lines begin that tell of it."""

_LOADED = re.compile(r"Model loading took ([\d.]+) GiB memory")
_STARTED = re.compile(
    r"Free memory on device \([\d.]+/(?P<gpu>[\d.]+) GiB\) on startup\. "
    r"Desired GPU memory utilization is \([\d.]+, (?P<wanted>[\d.]+) GiB\)\..* "
    r"(?P<graphs>[\d.]+) GiB for CUDAGraph memory\..*"
    r"Current kv cache memory in use is (?P<kv_cache>[\d.]+) GiB"
)


def read(file: Path, gpus: int) -> dict[str, Any] | None:
    """A GPU's memory in GiB: ``{"gpu_gib", "gpus", "parts": {"weights", "kv_cache", "graphs",
    "other"}}``, or None where it was not measured.

    ``other`` is what vLLM keeps free for activations, and what CUDA takes. Of several workers the
    one that told last stands for all.

    Args:
        file: the lines that the plugin has kept.
        gpus: on which the model lies.
    """
    text = file.read_text() if file.exists() else ""
    loaded, started = _LOADED.findall(text), list(_STARTED.finditer(text))
    if not loaded or not started:
        return None
    found = {name: float(value) for name, value in started[-1].groupdict().items()}
    weights, kv_cache, graphs = float(loaded[-1]), found["kv_cache"], found["graphs"]
    other = max(0.0, round(found["wanted"] - weights - kv_cache - graphs, 2))
    parts = {"weights": weights, "kv_cache": kv_cache, "graphs": graphs, "other": other}
    return {"gpu_gib": found["gpu"], "gpus": gpus, "parts": parts}


def of_part(file: Path, kv_cache: int, taken: int) -> dict[str, Any]:
    """The same parts for an engine that is told the size of its KV cache, and holds a part of one
    GPU; sizes are in bytes. Graphs are in ``other``."""
    loaded = _LOADED.findall(file.read_text() if file.exists() else "")
    weights, kv_gib = float(loaded[-1]) if loaded else 0.0, round(kv_cache / GIB, 2)
    other = max(0.0, round(taken / GIB - weights - kv_gib, 2))
    return {"gpus": 1, "parts": {"weights": weights, "kv_cache": kv_gib, "other": other}}
