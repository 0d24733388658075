"""A config of a 70B, for the tests of what is refused and of the checklist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from serve_app.config.document import GATEWAY_IMPORT_PATH, MODEL_IMPORT_PATH

LLAMA_70B = {
    "model": "meta-llama/Llama-3.3-70B-Instruct",
    "replicas": 1,
    "resources": {"accelerator_type": "H100", "num_cpus": 8},
    "engine": {"tensor_parallel_size": 4, "max_model_len": 8192},
}

_GATEWAY = {"name": "gateway", "route_prefix": "/", "import_path": GATEWAY_IMPORT_PATH}


def write(tmp_path: Path, *, gateway: bool = False, **changes: Any) -> Path:
    """A config of one model, its args changed (``engine`` is merged), with a gateway or without."""
    engine = {**LLAMA_70B["engine"], **changes.pop("engine", {})}  # type: ignore[dict-item]
    application: dict[str, Any] = {
        "name": "llama",
        "route_prefix": None,
        "import_path": MODEL_IMPORT_PATH,
        "args": {**LLAMA_70B, "engine": engine, **changes},
    }
    if runtime_env := application["args"].pop("runtime_env", None):
        application["runtime_env"] = runtime_env
    path = tmp_path / "config.yaml"
    applications = [_GATEWAY, application] if gateway else [application]
    path.write_text(yaml.safe_dump({"applications": applications}))
    return path
