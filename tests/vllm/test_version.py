"""The gateway's GET /version, against what vLLM says on its own."""

from __future__ import annotations

from vllm.version import __version__

from serve_app.gateway.versions import versions


def test_it_is_vllm_s_as_vllm_has_it() -> None:
    assert versions()["version"] == versions()["vllm"] == __version__
