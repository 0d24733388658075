"""What the gateway's settings name on a machine, as `run`, `reload` and `check` look at it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.command import refusal

from serve_app.check import checklist
from serve_app.config import keys
from serve_app.config.document import Fleet, load
from serve_app.errors import ConfigError
from serve_app.local import gateway_needs, judge, reload, runs, weights
from serve_app.local.found import Server
from serve_app.local.runs import Run

REPO = Path(__file__).parents[2]
_, HASH = keys.new()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path, host: str = "127.0.0.1", gpus: bool = False, **args: Any) -> Path:
    """A config whose gateway has these ``args``."""
    model = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    gateway = {"num_cpus": 0, **args}
    env_vars = gateway.pop("env_vars", {})
    document = {
        "http_options": {"host": host},
        "applications": [
            {
                "name": "m",
                "route_prefix": None,
                "import_path": "serve_app.model:app",
                "args": model | {"resources": {"device": "gpu" if gpus else "cpu", "num_cpus": 0}},
            },
            {
                "name": "gateway",
                "route_prefix": "/",
                "import_path": "serve_app.gateway:app",
                "args": gateway,
                "runtime_env": {"env_vars": env_vars},
            },
        ],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def fleet(folder: Path, **settings: Any) -> Fleet:
    return load(written(folder, **settings))


def key_file(folder: Path, *entries: dict[str, Any], name: str = "keys.yaml") -> dict[str, str]:
    (folder / name).write_text(yaml.safe_dump(list(entries)))
    return {"file": name}


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"keys": {"file": "none.yaml"}}, "keys: none.yaml: no such file"),
    ({"keys": {"secret_env": "NO_KEYS"}}, "the environment variable NO_KEYS is not set"),
    ({"usage_dir": "file/there"}, "usage_dir: file/there cannot be written"),
    ({"usage_spool": "/proc/nothing"}, "usage_spool: /proc/nothing cannot be written"),
    ({"usage_db": "sqlite:///file/x.db"}, "usage_db: file/x.db cannot be written"),
    ({"usage_db": "sqlite:///."}, "(it is a folder); name another file"),
    ({"usage_db": {"secret_env": "NO_DB"}}, "the environment variable NO_DB is not set"),
    ({"usage_db": {"secret_env": "OF_IT"}}, "the environment variable OF_IT must be sqlite:///"),
]


@pytest.mark.parametrize(("args", "told"), BROKEN, ids=[told for _, told in BROKEN])
def test_what_a_gateway_could_not_start_with_is_refused_in_a_sentence(
    args: dict[str, Any], told: str, folder: Path
) -> None:
    (folder / "file").touch()
    wrong = fleet(folder, env_vars={"OF_IT": "mysql://x"}, **args)
    with pytest.raises(ConfigError) as refused:
        judge.refuse(wrong, here=True)
    assert str(refused.value).startswith(f"{wrong.path}: application 'gateway': ")
    assert told in str(refused.value)


def test_what_can_be_made_is_not_refused(folder: Path) -> None:
    text = yaml.safe_dump([{"name": "a", "hash": HASH}])
    good = fleet(
        folder,
        keys={"secret_env": "KEYS"},
        usage_dir="a/new/folder",
        usage_spool=str(folder),
        usage_db="sqlite:///another/usage.db",
        env_vars={"KEYS": text},
    )
    assert list(gateway_needs.problems(good, {})) == []
    assert sorted(entry.name for entry in folder.iterdir()) == ["config.yaml"]


def test_run_says_it_before_anything_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = written(folder, usage_dir="/etc/passwd")
    assert refusal("run", str(path)) == [
        f"serve-app: {path}: application 'gateway': usage_dir: /etc/passwd cannot be written "
        "(/etc/passwd is no folder); name another folder"
    ]


def test_reload_says_it_before_anything_changes(folder: Path) -> None:
    run = Run(
        folder=folder / "8000",
        pid=os.getpid(),
        born=runs.birth(os.getpid()) or 0,
        host="127.0.0.1",
        ray_address=None,
        config=None,
        working_folder=folder,
        logs=True,
    )
    (folder / "keys.yaml").write_text("- {name: a, hsah: x}")
    for args, told in (
        ({"keys": {"file": "keys.yaml"}}, "keys.yaml: key a: 'hash' is missing"),
        ({"usage_dir": "keys.yaml"}, "usage_dir: keys.yaml cannot be written"),
    ):
        with pytest.raises(ConfigError, match=told):
            reload.reload(fleet(folder, **args), Server(run, None), tell=print)


def test_the_servers_own_variables_count(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A reload's shell may have others than the one in which the server was started."""
    run = Run(folder, os.getpid(), 0, "127.0.0.1", None, None, folder, True)
    name, value = next(iter(run.environment().items()))
    monkeypatch.delenv(name)
    assert run.environment()[name] == value


@pytest.mark.parametrize(
    ("host", "entries", "told"),
    [
        ("127.0.0.1", [{"name": "a", "hash": HASH}], []),
        ("0.0.0.0", [{"name": "a", "hash": HASH}], []),
        ("127.0.0.1", [], ["keys.yaml lists no API key, so nobody is let in"]),
        ("127.0.0.1", None, []),
        ("0.0.0.0", None, ["whoever reaches 0.0.0.0 may use the models"]),
        ("127.0.0.1", "team", []),
        (
            "0.0.0.0",
            "team",
            ["which everybody knows: alice, nightly, ops; whoever reaches 0.0.0.0"],
        ),
    ],
)
def test_who_is_let_in_is_told(host: str, entries: Any, told: list[str], folder: Path) -> None:
    args: dict[str, Any] = {}
    if entries == "team":
        args["keys"] = {"file": str(REPO / "configs/keys/team.yaml")}
    elif entries is not None:
        args["keys"] = key_file(folder, *entries)
    config = fleet(folder, host=host, **args)
    said = [*gateway_needs.open_to_all(config), *gateway_needs.odd_keys(config, os.environ)]
    assert [words in sentence for words, sentence in zip(told, said, strict=True)] == [True] * len(
        told
    )


def found(path: Path, check: str) -> list[tuple[str, str]]:
    return [(f.status, f.message) for f in checklist.static(path, None) if f.check == check]


def test_check_has_a_line_on_keys(folder: Path) -> None:
    none = "none: whoever reaches 127.0.0.1 may use every model"
    assert found(written(folder), "keys") == [("ok", none)]
    one = key_file(folder, {"name": "a", "hash": HASH})
    assert found(written(folder, keys=one), "keys") == [("ok", "1 in keys.yaml")]
    [(status, _), _] = found(written(folder, keys=key_file(folder)), "keys")
    assert status == "warn"


def test_check_refuses_what_run_does_but_not_a_path_of_other_machines(folder: Path) -> None:
    absolute = {"keys": {"file": "/etc/serve_app/keys.yaml"}, "usage_dir": "/proc/nothing"}
    [(status, said), (second, _)] = found(written(folder, **absolute), "gateway")
    assert (status, second) == ("fail", "fail")
    assert said == "keys: /etc/serve_app/keys.yaml: no such file"
    pods = written(folder, host="0.0.0.0", gpus=True, **absolute)  # no machine such as this one
    assert found(pods, "gateway") == []
    assert found(pods, "keys") == [
        ("ok", "those of /etc/serve_app/keys.yaml, which cannot be read here")
    ]
    relative = written(folder, gpus=True, keys={"file": "keys.yaml"})
    assert found(relative, "gateway") == [("fail", "keys: keys.yaml: no such file")]


def test_a_config_of_another_folder_says_where_to_start_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths are those of the working folder, not of the config."""
    checkout = folder / "checkout"
    (checkout / "configs").mkdir(parents=True)
    (checkout / "models" / "m").mkdir(parents=True)
    key_file(checkout, {"name": "a", "hash": HASH})
    config = written(folder, keys={"file": "keys.yaml"})
    document = yaml.safe_load(config.read_text())
    document["applications"][0]["args"]["model"] = "models/m"
    moved = checkout / "configs" / "fleet.yaml"
    moved.write_text(yaml.safe_dump(document))
    hint = f"start it in {checkout}, where that is"
    assert found(moved, "gateway") == [("warn", "keys: keys.yaml: no such file")]
    assert found(moved, "model") == [
        ("warn", "model is models/m, and there is no such folder here")
    ]
    fixes = [(f.check, f.fix) for f in checklist.static(moved, None) if f.fix == hint]
    assert sorted(fixes) == [("gateway", hint), ("model", hint)]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=f"keys.yaml: no such file; {hint}"):
        gateway_needs.refuse(load(moved), {})
    with pytest.raises(ConfigError, match=f"there is no folder {folder}/models/m; {hint}"):
        weights.refuse_missing(load(moved))
    monkeypatch.chdir(checkout)
    assert found(moved, "gateway") == found(moved, "model") == []
