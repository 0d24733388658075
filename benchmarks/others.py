"""Gateways by others, each in front of one server: installed in a folder of their own."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

BIN = Path(__file__).parents[1] / ".cache" / "gateways" / "bin"
"""Where ``make bench`` and ``make bench-gateway`` have installed them."""

LITELLM_ENV = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOG": "ERROR",
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
}


def litellm(work: Path, port: int, upstream: int, models: Iterable[str]) -> list[str]:
    """LiteLLM's proxy as it is fastest: one worker, no database, no keys, no log.

    Its environment is :data:`LITELLM_ENV`.
    """
    served = [
        {
            "model_name": model,
            "litellm_params": {
                "model": f"hosted_vllm/{model}",
                "api_base": f"http://127.0.0.1:{upstream}/v1",
                "api_key": "none",
            },
        }
        for model in models
    ]
    config = work / "litellm.yaml"
    quiet = {"telemetry": False, "set_verbose": False}
    config.write_text(yaml.safe_dump({"model_list": served, "litellm_settings": quiet}))
    return _words(BIN / "litellm", "--config", config, "--host", "127.0.0.1", "--port", port,
                  "--num_workers", 1)  # fmt: skip


def vllm_router(port: int, upstream: int, metrics_port: int) -> list[str]:
    """vllm-router, the one in Rust."""
    return _words(BIN / "vllm-router", "--host", "127.0.0.1", "--port", port, "--log-level",
                  "error", "--policy", "round_robin", "--prometheus-port", metrics_port,
                  "--worker-urls", f"http://127.0.0.1:{upstream}")  # fmt: skip


def version(package: str) -> str:
    """The version of one of them; empty where it is not installed."""
    folders = (BIN.parent / "lib").glob("python*/site-packages")
    found = importlib.metadata.distributions(name=package, path=[str(it) for it in folders])
    return next((it.version for it in found), "")


def absent(command: str, package: str) -> str:
    """Why one cannot run here; empty where it can."""
    if version(package) and (BIN / command).is_file():
        return ""
    return (
        f"{package} is not installed in {BIN.parent}, where make bench puts it; or run: python3 -m "
        "venv .cache/gateways && .cache/gateways/bin/pip install -r requirements/gateways.txt"
    )


def _words(*words: Any) -> list[str]:
    return [str(word) for word in words]
