"""A replica's answers to Serve, without an engine."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.config.settings import Adapter, ModelConfig, parse
from serve_app.errors import ConfigError, UserError
from serve_app.replica.server import ModelServer

TYPO = {"adaptors": [{"name": "poet", "path": "p"}]}


class FakeEngine:
    """As much of an engine, its adapters and front ends as Serve's calls reach."""

    worn_out = False

    def __init__(self) -> None:
        self.applied: list[list[Adapter]] = []
        self.refuses: Exception | None = None
        self.llm = self

    async def apply(self, adapters: list[Adapter]) -> None:
        if self.refuses:
            raise self.refuses
        self.applied.append(adapters)

    async def check_health(self) -> None:
        """It is well."""


@pytest.fixture
def replica() -> Any:
    """One whose constructor has returned."""
    deployment: Any = ModelServer
    # Without its __del__, which is a coroutine that Serve awaits.
    kind = type("Replica", (deployment.func_or_class,), {"__del__": lambda self: None})
    server: Any = kind.__new__(kind)
    server._engine = server._adapters = server._front_ends = FakeEngine()
    args = {"model": "org/base", "adapters": [{"name": "own", "path": "o"}]}
    server._config = parse(ModelConfig, args, "args")
    return server


@pytest.mark.parametrize(
    ("user_config", "names"),
    [
        ({"fallback": ["small"]}, ["own"]),  # for the gateway: nothing for a replica to do
        ({"adapters": [{"name": "poet", "path": "p"}]}, ["poet"]),
        ({"adapters": []}, []),
    ],
    ids=str,
)
async def test_adapters_of_the_args_stay_where_user_config_names_none(
    replica: Any, user_config: dict[str, Any], names: list[str]
) -> None:
    await replica.reconfigure(user_config)
    assert [[it.name for it in applied] for applied in replica._engine.applied] == [names]


async def test_a_wrong_user_config_refuses_the_start(replica: Any) -> None:
    with pytest.raises(ConfigError, match="user_config: 'adaptors' is not a setting"):
        await replica.reconfigure(TYPO)


async def test_a_wrong_user_config_leaves_a_replica_that_serves(
    replica: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await replica.reconfigure({"adapters": [{"name": "poet", "path": "p"}]})
    await replica.check_health()
    await replica.reconfigure(TYPO)
    assert "user_config: 'adaptors' is not a setting; did you mean 'adapters'?" in caplog.text
    assert "the adapters stay as they are" in caplog.text
    replica._engine.refuses = UserError("adapters need engine.enable_lora: true from the start")
    await replica.reconfigure({"adapters": [{"name": "other", "path": "p"}]})
    assert "adapters need engine.enable_lora" in caplog.text
    assert [[a.name for a in adapters] for adapters in replica._engine.applied] == [["poet"]]


async def test_what_is_not_the_users_fault_is_not_hidden(replica: Any) -> None:
    await replica.check_health()
    replica._engine.refuses = RuntimeError("the engine is dead")
    with pytest.raises(RuntimeError):
        await replica.reconfigure({"adapters": []})


async def test_a_replica_whose_front_ends_end_too_often_is_replaced(replica: Any) -> None:
    replica._front_ends.worn_out = True
    with pytest.raises(RuntimeError, match="its front ends ended too often"):
        await replica.check_health()
