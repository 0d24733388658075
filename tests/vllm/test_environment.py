"""What a replica's process is given in its environment."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from vllm import envs
from vllm.utils import system_utils

from serve_app import gateway, model
from serve_app.cluster import serve
from serve_app.config.environment import environment
from serve_app.config.settings import ModelConfig
from serve_app.errors import UserError
from serve_app.replica.engine import parse_args


def _config(**settings: object) -> ModelConfig:
    return ModelConfig.model_validate({"model": "org/model", **settings})


def _compile_key(config: ModelConfig) -> dict[str, object]:
    with mock.patch.dict(os.environ, environment(config)):
        return envs.compile_factors()


def test_one_folder_holds_all_caches() -> None:
    env = environment(_config(cache_dir="/cache"))
    folders = {name: value for name, value in env.items() if value.startswith("/cache")}
    assert folders == {
        "HF_HOME": "/cache/huggingface",
        "VLLM_CACHE_ROOT": "/cache/vllm",
        "TRITON_CACHE_DIR": "/cache/triton",
        "FLASHINFER_WORKSPACE_BASE": "/cache",
    }
    assert env["VLLM_ENABLE_STARTUP_PLAN"] == "1"
    assert "HF_HOME" not in environment(_config())


def test_the_config_s_own_environment_wins() -> None:
    env = environment(_config(cache_dir="/cache", env={"HF_HOME": "/models"}))
    assert env["HF_HOME"] == "/models"
    assert env["VLLM_CACHE_ROOT"] == "/cache/vllm"


def test_a_key_of_vllms_own_is_refused_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would then refuse every request of the gateway, which passes no client's key on."""
    monkeypatch.setenv("VLLM_API_KEY", "sk-x")
    assert envs.VLLM_API_KEY == "sk-x"
    with pytest.raises(UserError, match="unset VLLM_API_KEY: the model server is closed"):
        parse_args(_config(), ["m"], {})


def test_the_folder_is_not_in_the_key_of_what_is_compiled() -> None:
    """A warm folder that is mounted elsewhere stays warm."""
    key = _compile_key(_config(cache_dir="/cache"))
    assert key == _compile_key(_config(cache_dir="/mnt/other"))
    assert key == _compile_key(_config())
    assert key != _compile_key(_config(env={"VLLM_USE_AOT_COMPILE": "0"}))


@pytest.mark.parametrize("build", [model.app, gateway.app])
def test_an_application_s_runtime_env_reaches_its_deployment(
    monkeypatch: pytest.MonkeyPatch, build: Any
) -> None:
    """Serve builds the application in it, and leaves a deployment that has one alone."""
    own = {"env_vars": {"HF_TOKEN": "hf_example", "MY_FLAG": "0"}, "py_modules": ["gcs://x.zip"]}
    monkeypatch.setattr(serve.ray, "is_initialized", lambda: True)
    context = SimpleNamespace(runtime_env=own)
    monkeypatch.setattr(serve.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(serve, "controller", lambda: None)
    monkeypatch.setattr(model.capacity, "refuse_impossible", lambda needed: None)
    args = {"model": "org/model", "env": {"MY_FLAG": 1}} if build is model.app else {}
    given = build(args)._bound_deployment.ray_actor_options["runtime_env"]
    assert given["py_modules"] == ["gcs://x.zip"]
    assert given["env_vars"]["HF_TOKEN"] == "hf_example"
    if build is model.app:
        assert given["env_vars"]["MY_FLAG"] == "1"
    assert own["env_vars"] == {"HF_TOKEN": "hf_example", "MY_FLAG": "0"}


def test_in_a_replica_vllm_spawns_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it forks, ``lifeline.tie_children`` would not tie to the replica."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    monkeypatch.setattr(system_utils, "is_in_ray_actor", lambda: True)
    context = SimpleNamespace(gcs_address="127.0.0.1:1")
    monkeypatch.setattr(serve.ray, "get_runtime_context", lambda: context)
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert system_utils.get_mp_context().get_start_method() == "spawn"
