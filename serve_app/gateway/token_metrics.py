"""Tokens by model and API key, as Ray exports them: with ``ray_`` before each name."""

from __future__ import annotations

from ray.util.metrics import Counter

from serve_app.gateway.ledger import Entry

_tokens = Counter(
    "serve_app_gateway_tokens_total",
    "Tokens of ended requests, by model, API key and kind: prompt, cached (the part of the prompt "
    "that the KV cache had) or completion.",
    tag_keys=("model", "key", "kind"),
)
_unrecorded = Counter(
    "serve_app_gateway_usage_unrecorded_total",
    "Requests that usage_db or usage_dir will never have: a disk was full, or 4 GiB of requests "
    "waited for the database already.",
)


def count_unrecorded() -> None:
    """Count a request that could not be written down."""
    _unrecorded.inc()


class TokenMetrics:
    """The listener that counts tokens."""

    def entered(self, entry: Entry) -> None:
        if entry.usage is None:
            return
        for kind, tokens in (
            ("prompt", entry.usage.prompt_tokens),
            ("cached", entry.usage.cached_tokens),
            ("completion", entry.usage.completion_tokens),
        ):
            if tokens:  # Ray refuses to add nothing
                tags = {"model": entry.model, "key": entry.key, "kind": kind}
                _tokens.inc(tokens, tags=tags)
