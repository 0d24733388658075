"""``GET /fleet``: what it tells of each model, to whom, and when a page shall ask again."""

from __future__ import annotations

import asyncio
import heapq
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from harness.scripted import CREDENTIAL, RUNNING, Exchange, GatewayProcess, Upstream, reported

from serve_app.cluster.exchange import Load
from serve_app.cluster.progress import Phase
from serve_app.cluster.replicas import Watcher
from serve_app.config import keys
from serve_app.gateway import directory, exposition, fleet, pace
from serve_app.gateway.pace import HEADER, Pace
from serve_app.gateway.usage.record import Record

ONE, ONE_HASH = keys.new()
ALIKE, ALIKE_HASH = keys.new()
ADMIN, ADMIN_HASH = keys.new()

OURS = "serve_app_gateway_"

ADAPTERS = {"adapters": [{"name": "m-sql", "path": "/sql"}, {"name": "m-law", "path": "/law"}]}
ENGINE = {"max_model_len": 4096, "enable_lora": True}


def deployed(
    user_config: dict[str, Any] | None = None, status: str = "RUNNING", message: str = ""
) -> dict[str, Any]:
    """The model ``m`` with these adapters, as Serve reports it."""
    found = reported({"served_as": ["org/m"], "engine": ENGINE}, status)
    if user_config:
        named = {"name": "ModelServer", "user_config": user_config}
        found["deployed_app_config"]["deployments"] = [named]
    return found | {"message": message}


def starting(*nodes: str | None) -> dict[str, Any]:
    """The model ``m`` with a starting replica for each; None: it is not placed."""
    replicas = [
        RUNNING | {"state": "STARTING", "replica_id": f"s{n}", "node_id": node}
        for n, node in enumerate(nodes)
    ]
    model = deployed(status="DEPLOYING")
    return model | {"deployments": {"ModelServer": {"message": "", "replicas": replicas}}}


@pytest.fixture
def keyed(tmp_path: Path) -> dict[str, Any]:
    """The gateway's args where there are keys."""
    file = tmp_path / "keys.yaml"
    entries = [
        {"name": "one", "hash": ONE_HASH, "models": ["m", "m-sql"]},
        {"name": "alike", "hash": ALIKE_HASH, "models": ["m", "m-sql"]},
        {"name": "boss", "hash": ADMIN_HASH, "admin": True},
    ]
    file.write_text(yaml.safe_dump(entries))
    return {"keys": {"file": str(file)}}


async def test_it_tells_what_the_gateway_knows_of_a_model() -> None:
    applications = {"m": deployed(ADAPTERS)}
    async with GatewayProcess(1, 2, applications=applications) as gateway:
        gateway.board.publish("m", {"r0": ("h", 1), "r0-1": ("h", 2), "r1": ("h", 3)})
        gateway.board.report("r0", Load(3, 1, 256, 0.25))
        told = (await gateway.client.get("/fleet")).json()
        versions = (await gateway.client.get("/version")).json()
        gateway.board.publish("m", {})
    assert told["object"] == "fleet"
    assert told["version"] == versions
    load = {"running": 3, "waiting": 1, "capacity": 256, "kv_cache_usage": 0.25}
    assert told["models"] == {
        "m": {
            "status": "RUNNING",
            "message": "",
            "mend": "",
            "ids": ["m", "org/m"],
            "adapters": ["m-sql", "m-law"],
            "fallback": [],
            "asleep": False,
            "takes": [],
            "max_model_len": 4096,
            "memory": None,
            "queued": 0,
            "longest_wait_s": 0.0,
            "starting": [],
            "replicas": [
                {"id": "r0", "front_ends": 2, "asleep": False, "load": load, "weight": 1.0},
                {"id": "r1", "front_ends": 1, "asleep": False, "load": None, "weight": 1.0},
            ],
        }
    }


async def test_what_a_replica_tells_of_its_model_stays_while_there_is_none() -> None:
    parts = {"weights": 16.1, "kv_cache": 50.2, "graphs": 1.2, "other": 2.0}
    about = {"takes": ["chat"], "memory": {"gpu_gib": 79.2, "gpus": 1, "parts": parts}}
    place = {"host": "h", "port": 1}
    before, now = place, place | {"about": about}  # of an image that does not tell; of this one
    replicas = [
        SimpleNamespace(replica_id=SimpleNamespace(unique_id=f"r{n}"), replica_metadata=metadata)
        for n, metadata in enumerate((before, now))
    ]
    async with GatewayProcess() as gateway:
        watcher = Watcher(gateway.board, "ModelServer")
        watcher._clients["m"] = cast(Any, None)
        watcher._publish("m", SimpleNamespace(running_replicas=replicas))
        watcher._publish("m", SimpleNamespace(running_replicas=[]))
        told = (await gateway.client.get("/fleet")).json()["models"]["m"]
        gateway.board.forget("m")
        assert not gateway.board.about
    assert (told["takes"], told["memory"]) == (about["takes"], about["memory"])
    assert told["replicas"] == []


def about_a_part(gpu: str, **parts: float) -> dict[str, Any]:
    """What a replica with a part of this GPU tells."""
    memory = {"gpu_gib": 79.2, "gpus": 1, "gpu": gpu, "part_gib": 39.6, "parts": parts}
    return {"takes": ["chat"], "memory": memory}


async def test_what_others_have_of_a_models_gpu(keyed: dict[str, Any]) -> None:
    applications = {name: reported() for name in ("m", "n", "o", "elsewhere", "whole")}
    async with GatewayProcess(applications=applications, **keyed) as gateway:
        for name, gpu, weights in (("m", "A", 15.0), ("n", "A", 2.5), ("o", "A", 1.25)):
            gateway.board.publish(name, {}, about=about_a_part(gpu, weights=weights, kv_cache=1.0))
        gateway.board.publish("elsewhere", {}, about=about_a_part("B", weights=9.0))
        whole = {"takes": [], "memory": {"gpu_gib": 79.2, "gpus": 1, "parts": {"weights": 9.0}}}
        gateway.board.publish("whole", {}, about=whole)
        gateway.board.publish("removed", {}, about=about_a_part("A", weights=9.0))
        all_ = (await gateway.client.get("/fleet", headers={"x-api-key": ADMIN})).json()["models"]
        assert all_["m"]["memory"]["others"] == {"n": 3.5, "o": 2.25}
        assert all_["m"]["memory"]["part_gib"] == 39.6
        assert all_["elsewhere"]["memory"]["others"] == {}
        assert "others" not in all_["whole"]["memory"]
        seen = (await gateway.client.get("/fleet", headers={"x-api-key": ONE})).json()["models"]
        assert seen["m"]["memory"]["others"] == {"others": 5.75}  # whose names it may not know


async def test_models_that_share_gpus_are_gone_through_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And not once for each of them."""
    names = [f"m{n}" for n in range(20)]
    async with GatewayProcess(applications={name: reported() for name in names}) as gateway:
        for n, name in enumerate(names):
            gateway.board.publish(name, {}, about=about_a_part(f"GPU{n // 2}", weights=1.0))
        gone_through, models = [], gateway.directory.models
        monkeypatch.setattr(
            gateway.directory, "models", lambda: [gone_through.append(it) or it for it in models()]
        )
        told = (await gateway.client.get("/fleet")).json()["models"]
    assert [told[name]["memory"]["others"] for name in names[:3]] == [
        {"m1": 1.0},
        {"m0": 1.0},
        {"m3": 1.0},
    ]
    assert len(gone_through) <= 2 * len(names)


async def test_an_engine_that_holds_more_than_its_part_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet, "FRESH_S", -1.0)
    async with GatewayProcess(1, 2, applications={"m": reported()}) as gateway:
        gateway.board.report("r0", Load(0, 0, 256, 0.0))
        gateway.board.report("r1", Load(0, 0, 256, 0.0, over_plan=3 << 29))
        said = "an engine holds 1.50 GiB of its GPU beyond its part, and its neighbours may find"
        ready = await gateway.client.get("/ready")
        assert ready.status_code == 200
        assert ready.json()["models"]["m"]["message"].startswith(said)
        model = (await gateway.client.get("/fleet")).json()["models"]["m"]
        assert model["message"].startswith(said)
        series = f"{OURS}gpu_memory_over_plan_bytes"
        page = (await gateway.client.get("/metrics")).text
        [line] = [line for line in page.splitlines() if line.startswith(f"{series}{{")]
        assert float(line.split()[-1]) == 3 << 29
        gateway.board.report("r1", Load(0, 0, 256, 0.0))
        assert (await gateway.client.get("/ready")).json()["models"]["m"]["message"] == ""


async def test_an_old_report_is_no_load() -> None:
    async with GatewayProcess(1) as gateway:
        gateway.board.report("r0", Load(3, 1, 256, 0.25))
        gateway.front_ends[0].replica.load_until = 0.0
        told = (await gateway.client.get("/fleet")).json()
    assert [it["load"] for it in told["models"]["m"]["replicas"]] == [None]


async def test_a_model_that_failed_and_its_command_until_it_is_mended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet, "FRESH_S", -1.0)
    for variable in ("KUBERNETES_SERVICE_HOST", "RAY_CLUSTER_NAME"):
        monkeypatch.delenv(variable, raising=False)
    said = "'org/m' does not fit: the GPU ran out of memory"
    async with GatewayProcess(1, applications={"m": deployed(message=said)}) as gateway:
        model = (await gateway.client.get("/fleet")).json()["models"]["m"]
        assert (model["message"], model["mend"]) == (said, "serve-app logs m")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
        model = (await gateway.client.get("/fleet")).json()["models"]["m"]
        assert model["mend"] == "serve-app logs FLEET m"
        for cluster in ("chat-eu-x7k2p", "chat-eu-raycluster-x7k2p"):
            monkeypatch.setenv("RAY_CLUSTER_NAME", cluster)
            model = (await gateway.client.get("/fleet")).json()["models"]["m"]
            assert model["mend"] == "serve-app logs chat-eu m"
        mended = {"applications": {"m": deployed()}}
        gateway.directory._models = directory.read_details(mended)
        model = (await gateway.client.get("/fleet")).json()["models"]["m"]
        assert (model["message"], model["mend"]) == ("", "")


async def test_a_model_whose_engines_all_sleep_is_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "FRESH_S", -1.0)
    async with GatewayProcess(1, 2) as gateway:
        gateway.board.report("r0", Load(0, 0, 256, 0.0, asleep=True))
        gateway.board.report("r1", Load(0, 0, 256, 0.0))
        model = (await gateway.client.get("/fleet")).json()["models"]["m"]
        assert [it["asleep"] for it in model["replicas"]] == [True, False]
        assert (model["asleep"], model["mend"]) == (False, "")
        gateway.board.report("r1", Load(0, 0, 256, 0.0, asleep=True))
        model = (await gateway.client.get("/fleet")).json()["models"]["m"]
        assert (model["asleep"], model["mend"]) == (True, "serve-app admin m wake")


async def test_phases_of_starts_and_a_start_that_waits_for_a_gpu() -> None:
    async with GatewayProcess(applications={"m": starting("n0", None)}) as gateway:
        waiting = "waiting for 1 H200 GPU on one node"
        gateway.directory._phases = {"s0": Phase("loading weights", 1.0), "s1": Phase(waiting, 1.0)}
        model = (await gateway.client.get("/fleet")).json()["models"]["m"]
    assert [it["phase"] for it in model["starting"]] == ["loading weights", waiting]
    assert all(it["seconds"] > 0 for it in model["starting"])
    assert model["replicas"] == []
    assert model["mend"] == "serve-app check CONFIG --cluster"


async def test_a_key_sees_its_models_alone_and_an_admin_all(keyed: dict[str, Any]) -> None:
    applications = {"m": deployed(ADAPTERS), "n": reported()}
    async with GatewayProcess(1, applications=applications, **keyed) as gateway:
        for headers in ({}, {"x-api-key": "sk-wrong"}):
            answer = await gateway.client.get("/fleet", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["type"] == "authentication_error"
        told = (await gateway.client.get("/fleet", headers={"x-api-key": ONE})).json()
        assert told["models"].keys() == {"m"}
        assert told["models"]["m"]["ids"] == ["m", "org/m"]
        assert told["models"]["m"]["adapters"] == ["m-sql"]
        assert told["models"]["m"]["replicas"][0]["id"] == "r0"
        told = (await gateway.client.get("/fleet", headers={"x-api-key": ADMIN})).json()
        assert told["models"].keys() == {"m", "n"}
        assert told["models"]["m"]["adapters"] == ["m-sql", "m-law"]


async def test_only_an_admin_hears_of_a_broken_keys_file(keyed: dict[str, Any]) -> None:
    async with GatewayProcess(1, **keyed) as gateway:
        keyring: Any = gateway.app._keyring
        keyring.problem = "the file is no list; the keys read last stay in force"
        told = (await gateway.client.get("/fleet", headers={"x-api-key": ONE})).json()
        assert "keys" not in told
        told = (await gateway.client.get("/fleet", headers={"x-api-key": ADMIN})).json()
        assert "stay in force" in told["keys"]


async def test_who_sees_all_hears_that_usage_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Record, "problem", "the database is away")
    database = {"usage_db": f"sqlite:///{tmp_path}/usage.db", "usage_spool": f"{tmp_path}/spool"}
    async with GatewayProcess(1, **database) as gateway:
        told = (await gateway.client.get("/fleet")).json()
    assert told["usage"] == "the database is away"


async def test_it_is_made_once_for_all_who_see_the_same(
    keyed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    make = fleet.Fleets._fleet

    def counted(self: Any, caller: Any) -> Any:
        made.append(caller.name)
        return make(self, caller)

    monkeypatch.setattr(fleet.Fleets, "_fleet", counted)
    monkeypatch.setattr(fleet, "FRESH_S", 3600.0)
    async with GatewayProcess(1, **keyed) as gateway:
        for _ in range(3):
            for key in (ONE, ALIKE, ADMIN):
                answer = await gateway.client.get("/fleet", headers={"x-api-key": key})
                assert answer.status_code == 200
    assert made == ["one", "boss"]


async def test_who_has_it_gets_304_until_something_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet, "FRESH_S", -1.0)
    async with GatewayProcess(1) as gateway:
        first = await gateway.client.get("/fleet")
        has = {"if-none-match": first.headers["etag"]}
        same = await gateway.client.get("/fleet", headers=has)
        assert (same.status_code, same.content) == (304, b"")
        assert float(same.headers[HEADER]) > 0
        gateway.board.report("r0", Load(1, 0, 256, 0.5))
        other = await gateway.client.get("/fleet", headers=has)
        assert other.status_code == 200
        assert other.headers["etag"] != first.headers["etag"]
        head = await gateway.client.head("/fleet")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == other.headers["content-length"]
        assert "private" in head.headers["cache-control"]


@pytest.mark.parametrize(("pages", "every_s"), [(1, 2.0), (40, 2.0), (1000, 50.0)])
def test_pages_together_ask_as_often_as_the_gateway_bears(
    pages: int, every_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each asks again when it was told to; the clock goes from one request to the next."""
    now = 1000.0
    monkeypatch.setattr(pace.time, "monotonic", lambda: now)
    turns = Pace(per_s=20.0)
    due = [(now + page / 1000, page) for page in range(pages)]  # they are opened almost at once
    asked: list[float] = []
    while now < 1400:
        now, page = heapq.heappop(due)
        asked.append(now)
        heapq.heappush(due, (now + turns.next_s(2.0), page))
    late = [at for at in asked if 1200 <= at < 1400]
    assert len(late) == pytest.approx(pages * 200 / every_s, rel=0.05)


def test_a_chart_does_not_make_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace.time, "monotonic", lambda: 1000.0)
    turns = Pace(per_s=20.0)
    assert [turns.next_s(least_s) for least_s in (5.0, 2.0, 5.0)] == [5.0, 2.0, 5.0]


def test_who_asks_in_a_loop_does_not_send_others_away_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(pace.time, "monotonic", lambda: now)
    turns = Pace(per_s=20.0)
    for _ in range(100_000):
        turns.next_s(2.0)
    assert turns.next_s(2.0) == pace.MOST_S
    now += pace.MOST_S
    assert turns.next_s(2.0) == 2.0


def test_there_are_more_turns_where_a_request_costs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    through_ray = pace.affordable_per_s()
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert pace.affordable_per_s() > through_ray > 0


# --- GET /metrics, for pages with charts ---------------------------------------------------------


async def engine(exchange: Exchange) -> None:
    assert exchange.header("x-serve-app-credential") == [CREDENTIAL]
    page = b"# HELP vllm:a A.\n# TYPE vllm:a gauge\n" + b"vllm:a 1.0\n" * 500
    await exchange.answer(page, "content-type: text/plain")


async def test_charts_share_a_page_and_prometheus_gets_its_own() -> None:
    async with Upstream(engine) as upstream, GatewayProcess(upstream) as gateway:
        ages: list[float] = []
        for _ in range(3):
            shared = await gateway.client.get("/metrics", headers={"cache-control": "max-age=900"})
            assert float(shared.headers[HEADER]) >= 4
            ages.append(float(shared.headers["x-age-s"]))
        assert len(upstream.exchanges) == 1
        assert ages == sorted(ages)
        assert ages[0] >= 0
        packed = await gateway.client.get(
            "/metrics", headers={"cache-control": "max-age=900", "accept-encoding": "gzip"}
        )
        assert packed.headers["content-encoding"] == "gzip"
        assert int(packed.headers["content-length"]) < len(shared.content) / 5
        assert packed.text == shared.text  # httpx has unpacked it
        assert len(upstream.exchanges) == 1
        for headers in ({}, {"cache-control": "max-age=0"}, {"cache-control": "no-cache"}):
            answer = await gateway.client.get("/metrics", headers=headers)
            assert answer.headers["content-type"] == exposition.CONTENT_TYPE
        assert len(upstream.exchanges) == 4


async def test_a_page_that_could_not_be_made_is_not_shared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with GatewayProcess() as gateway:
        asked = {"cache-control": "max-age=900"}
        with monkeypatch.context() as broken:
            broken.setattr(exposition, "_page", lambda *_: 1 / 0)
            assert (await gateway.client.get("/metrics", headers=asked)).status_code == 500
        answers = await asyncio.gather(
            *(gateway.client.get("/metrics", headers=asked) for _ in range(5))
        )
        assert {it.status_code for it in answers} == {200}
