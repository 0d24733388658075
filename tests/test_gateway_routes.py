"""Which of vLLM's routes clients reach: each one is either for them or closed, none by accident."""

from __future__ import annotations

import pytest

from serve_app.gateway.server import _CLOSED

FOR_CLIENTS = {
    "/detokenize", "/generative_scoring", "/health", "/inference/v1/generate", "/invocations",
    "/tokenize", "/tokenizer_info", "/v1/audio/transcriptions", "/v1/audio/translations",
    "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/chat/completions/derender",
    "/v1/chat/completions/render", "/v1/completions", "/v1/completions/derender",
    "/v1/completions/render", "/v1/messages", "/v1/messages/count_tokens",
    "/v1/messages/render", "/v1/models", "/v1/realtime", "/v1/responses",
    "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel", "/version",
}  # fmt: skip


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The routes of vLLM's app with all that can be turned on by its environment turned on."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    profiler = '{"profiler": "torch", "torch_profiler_dir": "/tmp/profile"}'
    argv = ["--model", "m", "--enable-tokenizer-info-endpoint", "--profiler-config", profiler]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
    app = build_app(args, ("generate", "transcription", "realtime"), None)
    return {route.path for route in app.routes}


def test_every_route_of_vllm_is_for_clients_or_closed(routes: set[str]) -> None:
    """A new vLLM that brings a new route makes someone decide which it is."""
    assert {path for path in routes if not _CLOSED.match(path)} == FOR_CLIENTS
    assert {"/collective_rpc", "/sleep", "/metrics", "/update_weights"} <= routes
