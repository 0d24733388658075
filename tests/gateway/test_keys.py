"""API keys: who gets in, what each key sees, and what no client may say."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.scripted import GatewayProcess, Upstream, reported

from serve_app.config import keys
from serve_app.config.document import OPERATOR_HASH
from serve_app.config.settings import KeySource
from serve_app.gateway.callers import Caller
from serve_app.gateway.errors import GatewayError
from serve_app.gateway.keyring import Keyring
from serve_app.gateway.routes import RELAYED

KEY, HASH = keys.new()
OTHER, OTHER_HASH = keys.new()
CHAT = "/v1/chat/completions"
MODELS = {
    "m": reported({"served_as": ["org/m:1.0"]}),
    "secret": reported({}),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "keys.yaml", {"name": "team-a", "hash": HASH, "models": ["m"]})


def write(file: Path, *entries: dict[str, Any]) -> Path:
    beside = file.with_suffix(".new")
    beside.write_text(yaml.safe_dump(list(entries)))
    beside.replace(file)
    return file


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def gateway(file: Path) -> Callable[..., GatewayProcess]:
    def started(*upstreams: Upstream, **more: Any) -> GatewayProcess:
        return GatewayProcess(*upstreams, applications=MODELS, keys={"file": str(file)}, **more)

    return started


def test_a_key_is_known_or_not_while_the_file_is_read_anew(file: Path) -> None:
    """It is read in a thread, and never half in force."""
    ring = Keyring(KeySource(file=str(file)))
    others = [{"name": f"k{n}", "hash": keys.new()[1]} for n in range(100)]
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            for entry in ({"name": "team-b", "hash": OTHER_HASH}, {"name": "team-a", "hash": HASH}):
                write(file, entry, *others)
                ring.refresh()

    thread = threading.Thread(target=change)
    thread.start()
    found = set()
    until = time.monotonic() + 1.0
    while time.monotonic() < until or len(found) < 3:
        for key in (KEY, OTHER):
            try:
                found.add(ring.caller({b"x-api-key": key.encode()}).name)
            except GatewayError as error:
                found.add(str(error.status))
    ended.set()
    thread.join()
    assert found == {"team-a", "team-b", "401"}


async def test_no_route_answers_without_a_key(gateway: Any) -> None:
    """But the two that probes ask, and those tell nothing of the models."""
    async with Upstream() as upstream, gateway(upstream) as at:
        paths = [(r.method, r.path.replace("{response_id}", "resp_1")) for r in RELAYED]
        own = [("GET", p) for p in ("/v1/models", "/v1/models/m", "/openapi.json", "/nothing")]
        for method, path in [*paths, *own]:
            answer = await at.client.request(method, path, json={"model": "m"})
            assert (answer.status_code, path) == (401, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "missing_api_key"
        assert (await at.client.get("/health")).json() == {"status": "ok"}
        ready = await at.client.get("/ready")
        assert ready.json() == {"status": "ready", "waiting_for": [], "models": {}}
        assert upstream.exchanges == []


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
async def test_a_key_lets_in_and_stays_in_the_gateway(gateway: Any, header: str) -> None:
    value = f"bearer  {KEY}" if header == "authorization" else KEY
    async with Upstream() as upstream, gateway(upstream) as at:
        answer = await at.client.post(CHAT, json={"model": "m"}, headers={header: value})
        assert answer.json() == {"ok": True}
        (request,) = upstream.exchanges
        assert KEY not in str(request.headers)


async def test_the_answer_to_a_wrong_key_is_in_the_words_of_the_api(gateway: Any) -> None:
    async with Upstream() as upstream, gateway(upstream) as at:
        answer = await at.client.post(CHAT, json={"model": "m"}, headers=bearer(OTHER))
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert OTHER not in answer.text
        headers = {"x-api-key": OTHER}
        answer = await at.client.post("/v1/messages", json={"model": "m"}, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["type"] == "error"
        assert answer.json()["error"]["type"] == "authentication_error"


async def test_a_key_sees_its_models_alone(gateway: Any) -> None:
    async with Upstream() as upstream, gateway(upstream) as at:
        listed = await at.client.get("/v1/models", headers=bearer(KEY))
        assert [card["id"] for card in listed.json()["data"]] == ["m", "org/m:1.0"]
        assert list((await at.client.get("/ready", headers=bearer(KEY))).json()["models"]) == ["m"]
        for named in ("secret", "not there"):  # so nobody learns which of them exists
            answer = await at.client.post(CHAT, json={"model": named}, headers=bearer(KEY))
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                403,
                "model_not_allowed",
            )
            assert answer.json()["error"]["message"] == (
                f"The API key 'team-a' may not use the model '{named}'. It may use: m, org/m:1.0."
            )
        answer = await at.client.get("/v1/models/secret", headers=bearer(KEY))
        assert answer.status_code == 403
        answer = await at.client.post(CHAT, json={"model": "org/m:1.0"}, headers=bearer(KEY))
        assert answer.status_code == 200
        assert len(upstream.exchanges) == 1


def test_with_a_broken_file_at_the_start_the_operator_gets_in_and_hears_of_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OPERATOR_HASH, OTHER_HASH)
    write(file, {"name": "team-a", "hsah": HASH})
    ring = Keyring(KeySource(file=str(file)))
    assert ring.problem.endswith("did you mean 'hash'?); nobody is let in")
    assert ring.caller({b"x-api-key": OTHER.encode()}).admin
    with pytest.raises(GatewayError):
        ring.caller({b"x-api-key": KEY.encode()})


def test_a_file_without_a_key_lets_nobody_in_and_says_so(file: Path) -> None:
    write(file)
    ring = Keyring(KeySource(file=str(file)))
    assert ring.problem == f"{file} lists no API key, so nobody is let in"
    write(file, {"name": "team-a", "hash": HASH})
    ring.refresh()
    assert ring.problem == ""
    assert ring.caller({b"x-api-key": KEY.encode()}).name == "team-a"


async def test_a_changed_file_counts_and_a_broken_one_does_not(gateway: Any, file: Path) -> None:
    async with Upstream() as upstream, gateway(upstream) as at:
        ring = at.app._keyring

        async def status(key: str) -> int:
            answer = await at.client.get("/v1/models", headers=bearer(key))
            return int(answer.status_code)

        assert (await status(KEY), await status(OTHER)) == (200, 401)
        admin = {"name": "boss", "hash": OTHER_HASH, "admin": True}
        write(file, admin)
        ring.refresh()
        assert (await status(KEY), await status(OTHER)) == (401, 200)
        write(file, {"name": "boss", "hsah": OTHER_HASH})
        ring.refresh()
        assert (await status(KEY), await status(OTHER)) == (401, 200)
        said = (await at.client.get("/ready", headers=bearer(OTHER))).json()["keys"]
        assert "key boss: 'hash' is missing (there is 'hsah'; did you mean 'hash'?)" in said
        assert said.endswith("the keys read last stay in force")
        for broken in ("- {name: a, expires: 2027-13-45}", "[" * 100_000, "\0", "a: b", "- {1: 2}"):
            await asyncio.to_thread(file.write_text, broken)
            ring.refresh()
            assert (ring.problem != "", await status(OTHER)) == (True, 200)
        await asyncio.to_thread(file.unlink)
        ring.refresh()
        assert await status(OTHER) == 200
        write(file, admin)
        ring.refresh()
        assert "keys" not in (await at.client.get("/ready", headers=bearer(OTHER))).json()


def test_a_mounted_secret_is_followed_as_the_kubelet_changes_it(tmp_path: Path) -> None:
    """By one link, ``..data``, that another takes the place of; the file's own link stays."""
    for version, entry in (
        ("..1", {"name": "team-a", "hash": HASH}),
        ("..2", {"name": "team-b", "hash": OTHER_HASH}),
    ):
        (tmp_path / version).mkdir()
        write(tmp_path / version / "keys.yaml", entry)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "keys.yaml").symlink_to("..data/keys.yaml")
    ring = Keyring(KeySource(file=str(tmp_path / "keys.yaml")))
    assert ring.caller({b"x-api-key": KEY.encode()}).name == "team-a"
    (tmp_path / "..data_tmp").symlink_to("..2")
    (tmp_path / "..data_tmp").replace(tmp_path / "..data")
    ring.refresh()
    assert ring.caller({b"x-api-key": OTHER.encode()}).name == "team-b"
    with pytest.raises(GatewayError):
        ring.caller({b"x-api-key": KEY.encode()})


async def test_an_expired_key_says_so(gateway: Any, file: Path) -> None:
    write(file, {"name": "old", "hash": HASH, "expires": "2026-01-31T02:00+02:00"})
    async with Upstream() as upstream, gateway(upstream) as at:
        answer = await at.client.get("/v1/models", headers=bearer(KEY))
        assert answer.status_code == 401
        assert answer.json()["error"]["message"] == (
            "The API key 'old' expired at 2026-01-31 00:00 UTC; ask for a new one."
        )
        assert upstream.exchanges == []


async def test_without_a_readable_file_nobody_gets_in(tmp_path: Path) -> None:
    async with GatewayProcess(keys={"file": str(tmp_path / "none.yaml")}) as at:
        answer = await at.client.get("/v1/models", headers=bearer(KEY))
        assert answer.status_code == 401


async def test_keys_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM_KEYS", yaml.safe_dump([{"name": "a", "hash": HASH}]))
    async with GatewayProcess(keys={"secret_env": "TEAM_KEYS"}) as at:
        assert (await at.client.get("/v1/models", headers=bearer(KEY))).status_code == 200


async def test_an_upload_without_a_key_is_refused_before_it_is_read(gateway: Any) -> None:
    async with Upstream() as upstream, gateway(upstream, max_body_mib=1) as at:
        answer = await at.client.post(CHAT, content=b"x" * 2_000_000)
        assert answer.status_code == 401  # not 413


@pytest.mark.parametrize(
    "said",
    [
        b'{"model": "m", "kv_transfer_params": {"do_remote_prefill": true}}',
        b'{"model": "m", "kv_transfer_p\\u0061rams": {}}',
        b'{"model": "m", "vllm_xargs": {"kv_transfer_params": 1}}',
        b'{"model": "m", "sampling_params": {"extra_args": {"kv_transfer_params": {}}}}',
        b'{"model": "m", "ec_transfer_params": {}}',
        b'{"model": "m", "vllm_xargs": {"ec_transfer_params": 1}}',
        b'{"model": "m", "priority": -1}',
        b'{"model": "m", "priority": 0, "priority": "-1"}',
        b'{"model": "m", "priority": true}',
    ],
)
@pytest.mark.parametrize(
    "path",
    [CHAT, "/v1/completions", "/v1/messages", "/invocations", "/inference/v1/generate", "/rerank"],
)
async def test_what_steers_an_engine_is_not_for_clients(said: bytes, path: str) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as at:
        headers = {"content-type": "application/json"}
        answer = await at.client.post(path, content=said, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_for_clients")
        answer = await at.client.post(path + "?model=m", content=said, headers=headers)
        assert answer.status_code == 400
        assert upstream.exchanges == []


async def test_nor_is_it_in_a_form() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as at:
        for xargs in ('{"kv_transfer_params": "x"}', "{"):
            answer = await at.client.post(
                "/v1/audio/transcriptions",
                data={"model": "m", "vllm_xargs": xargs},
                files={"file": b""},
            )
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] in ("kv_transfer_params", "vllm_xargs")
        assert upstream.exchanges == []


async def test_the_priority_that_all_have_is_nothing_to_refuse() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as at:
        for priority in (0, None):
            body = {"model": "m", "priority": priority, "vllm_xargs": None, "sampling_params": {}}
            assert (await at.client.post(CHAT, json=body)).status_code == 200
        assert len(upstream.exchanges) == 2


async def test_headers_that_steer_an_engine_are_not_for_clients() -> None:
    steering = {"X-Vllm-Priority": "-9", "X-data-parallel-rank": "1", "x-serve-app-asleep": "1"}
    async with Upstream() as upstream, GatewayProcess(upstream) as at:
        headers = {**steering, "x-kept": "yes"}
        await at.client.post(CHAT, json={"model": "m"}, headers=headers)
        (request,) = upstream.exchanges
        names = {name.lower() for name, _ in request.headers}
        assert "x-kept" in names
        assert not names & {name.lower() for name in steering}


def test_which_models_a_caller_may_use() -> None:
    model: Any = type("M", (), {"ids": ("llama", "org/llama", "poet"), "adapters": ("poet",)})()
    assert Caller("a", ("llama",)).may_use("org/llama", model)
    assert not Caller("a", ("llama",)).may_use("poet", model)
    assert Caller("a", ("po*",)).may_use("poet", model)
    assert not Caller("a", ("po*",)).may_use("llama", model)
    assert Caller("a").may_use("anything", None)
    assert not Caller("a", ("llama",)).may_use("other", None)


def test_a_new_key_is_long_and_its_hash_is_that_of_the_file() -> None:
    made = {keys.new()[0] for _ in range(100)}
    assert len(made) == 100
    assert all(len(key) == len("sk-") + 43 for key in made)
    assert keys.digest(KEY.encode()) == HASH
    assert json.dumps(HASH).startswith('"sha256:')


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"a": 1}, "k: must be a list of keys, each as `serve-app keys new` prints it, not a map"),
        (["a"], "k: key 1 must be a mapping with a name and a hash"),
        ([{"name": "a"}], "k: key a: 'hash' is missing"),
        ([{"name": "a b", "hash": HASH}], "k: key 1: name: 'a b' must be up to 64"),
        ([{"name": KEY, "hash": HASH}], "k: key 1: name: is a key; write whose it is"),
        ([{"name": "a", "hash": KEY}], "k: key a: hash: is not 'sha256:'"),
        ([{"name": "a", "hash": [KEY]}], "k: key a: hash: is not 'sha256:'"),
        (
            [{"name": "a", "hash": HASH, "model_limits": {"m": {"tokens_per_hour": 1}}}],
            "k: key a: 'model_limits.m.tokens_per_hour' is not a setting",
        ),
        ([{"name": "a", "hash": HASH, "weight": 0}], "k: key a: weight is 0, but"),
        *(
            ([{"name": "a", "hash": HASH, **entry}], f"k: key a: {said}")
            for entry, said in (
                ({"models": []}, "models: is empty, so the key may use none; list ids or patterns"),
                ({"models": None}, "models: is empty, so the key may use none; list ids or patt"),
                ({"models": ["[*]"]}, "models: '[*]' is neither a model's id nor a pattern, in w"),
                ({"models": ["a, b"]}, "models: 'a, b' is neither a model's id nor a pattern"),
                ({"model_limits": {"m?": {}}}, "model_limits: 'm?' is neither a model's id nor"),
                ({"tokens_per_minute": True}, "tokens_per_minute is true, but must be a whole nu"),
                ({"weight": True}, "weight is true, but must be a number, without a unit"),
                ({"expires": "31.1.2027"}, "expires: '31.1.2027' is no day or time; write a day,"),
                ({"expires": "9999-12-31T23:00-02:00"}, "expires: '9999-12-31T23:00-02:00' is no"),
                ({"expires": 20270131}, "expires: 20270131 is no day or time; write a day, "),
                ({"admin": "maybe"}, "admin is 'maybe', but must be true or false"),
            )
        ),
        ([{"name": "", "hash": HASH}], "k: key 1: name: is empty; write whose key it is, such as"),
        ([{"name": None, "hash": HASH}], "k: key 1: name: is empty; write whose key it is"),
        ([{"name": "_x", "hash": HASH}], "k: key 1: name: '_x' must be up to 64 letters (a to z)"),
        ([{"name": [KEY], "hash": HASH}], "k: key 1: name: must be text"),
        ([{"hash": HASH}], "k: key 1: 'name' is missing"),
        (
            [{"name": name, "hash": keys.new()[1]} for name in "bacda"],
            "k: two keys are named a, the 2nd and the 5th of the list; give one of them another",
        ),
        (
            [{"name": "a", "hash": HASH}, {"name": "b", "hash": HASH}],
            "k: a and b have the same hash, so they are one key; remove one",
        ),
    ],
)
def test_a_wrong_entry_is_named(entries: Any, said: str) -> None:
    with pytest.raises(keys.ConfigError) as error:
        keys.parse_all(entries, "k")
    assert str(error.value).startswith(said)
    assert KEY not in str(error.value)
