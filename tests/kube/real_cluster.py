"""A real cluster for the day-two tests: `make test-kube`.

The context must be named. A namespace of its own is made and removed, and no other is touched.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from site_under_test import Site

from serve_app.errors import UserError
from serve_app.kuberay.live.api_server import APIServer

_KWOK = "kwok.x-k8s.io/node"
"""Annotation of machines that KWOK fakes."""

_READY_S = 900.0
"""Seconds for a fleet to come up: pulling the image, fetching a small model, starting on a CPU."""


@contextmanager
def real_cluster(context: str, image: str, folder: Path) -> Iterator[Site]:
    """A namespace of this run's own on the cluster of a kubeconfig's context.

    Skips where the cluster has no KubeRay, or what the fleet needs is missing.
    """
    if re.search(r"prod|prd|live", context, re.IGNORECASE):
        pytest.exit(f"'{context}' looks like production; these tests break a fleet on purpose", 2)
    try:
        server = APIServer.connect(context=context)
        server.list("RayService", "default")
        nodes = server.list("Node")
    except UserError as error:
        pytest.exit(f"{context}: {error}", 2)
    gpus = any(_KWOK in (node["metadata"].get("annotations") or {}) for node in nodes)
    if not gpus and not image:
        pytest.exit(
            "name an image of target cpu that the cluster can pull: make test-kube IMAGE=…", 2
        )
    namespace = f"serve-app-test-{secrets.token_hex(3)}"
    site = Site(
        server,
        namespace,
        ["--context", context],
        folder,
        gpus=gpus,
        image=image or "example.com/serve-app:1",
        timeout_s=120.0 if gpus else _READY_S,
    )
    server.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    try:
        yield site
    finally:
        server.delete("Namespace", namespace)
        deadline = time.monotonic() + 120
        while server.get("Namespace", namespace) and time.monotonic() < deadline:
            time.sleep(1)
    assert server.get("Namespace", namespace) is None, f"namespace {namespace} is still there"
