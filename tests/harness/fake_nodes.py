"""A real Ray control plane whose nodes have GPUs in name only."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

SMALL: dict[str, Any] = {"object_store_memory": 80 * 2**20}
"""Of each node: nothing is put there."""


@contextmanager
def connected(start: Callable[[Cluster], None], **init: Any) -> Iterator[Cluster]:
    """A cluster that ``start`` adds nodes to, with this process connected to it.

    Its files are apart from any other Ray's. ``init`` goes to ``ray.init``.
    """
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # socket paths must be short
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder
    fake = Cluster()
    try:
        try:
            start(fake)
        except Exception:  # Ray gives a node 30 s, which a busy machine may not keep
            fake.shutdown()
            start(fake)
        ray.init(address=fake.address, log_to_driver=False, **init)
        yield fake
    finally:
        serve.shutdown()
        ray.shutdown()
        fake.shutdown()
        os.environ.pop("RAY_TMPDIR")
        if before is not None:
            os.environ["RAY_TMPDIR"] = before
        shutil.rmtree(folder, ignore_errors=True)
