"""What the gateway makes of Serve's report: which models there are, and which replicas."""

from __future__ import annotations

import asyncio
import copy
from types import SimpleNamespace
from typing import Any, cast

import pytest
from harness.scripted import GatewayProcess, reported

from serve_app.cluster.exchange import Load
from serve_app.cluster.replicas import Watcher, addresses
from serve_app.gateway import directory
from serve_app.gateway.directory import Model, read_details
from serve_app.gateway.policy import FewestRequests
from serve_app.gateway.replicas import Board, FrontEnd
from serve_app.gateway.standing import SLOW_START_S

CHAT = "/v1/chat/completions"


def read(**applications: Any) -> dict[str, Model]:
    return read_details({"applications": applications})


# --- Serve's report --------------------------------------------------------------------------


def test_a_running_model_is_up_under_all_its_ids() -> None:
    args = {
        "model": "org/base",
        "served_as": ["org/x"],
        "adapters": [{"name": "lora", "path": "p"}],
    }
    [model] = read(x=reported(args)).values()
    assert (model.name, model.ids, model.adapters) == ("x", ("x", "org/x", "lora"), ("lora",))
    assert (model.root, model.replicas, model.up, model.broken) == ("org/base", 1, True, False)


def test_only_models_are_models() -> None:
    gateway = reported()
    gateway["deployed_app_config"]["import_path"] = "serve_app.gateway:app"
    by_hand = reported() | {"deployed_app_config": None}
    assert read(gateway=gateway, by_hand=by_hand) == {}


@pytest.mark.parametrize("status", ["DELETING", "NOT_STARTED"])
def test_a_model_that_is_being_removed_is_gone(status: str) -> None:
    assert read(x=reported(status=status)) == {}


@pytest.mark.parametrize("status", ["DEPLOYING", "RUNNING", "UNHEALTHY", "DEPLOY_FAILED"])
def test_a_model_is_listed_in_every_other_state(status: str) -> None:
    [model] = read(x=reported(status=status)).values()
    assert model.up == (status == "RUNNING")
    assert model.broken == (status == "DEPLOY_FAILED")


def test_a_model_scaled_to_zero_is_there_and_need_not_be_up() -> None:
    asleep = reported({"autoscaling": {"min_replicas": 0, "max_replicas": 2}})
    asleep["deployments"]["ModelServer"]["replicas"] = []
    needed = reported({"autoscaling": {"min_replicas": 1, "max_replicas": 2}})
    needed["deployments"]["ModelServer"]["replicas"] = [
        {"state": "STARTING", "replica_id": "r", "start_time_s": 0}
    ]
    models = read(asleep=asleep, needed=needed)
    assert (models["asleep"].must_be_up, models["asleep"].up) == (False, True)
    assert (models["needed"].must_be_up, models["needed"].up) == (True, False)


NONSENSE: list[dict[str, Any]] = [
    {"autoscaling": {"min_replicas": None}},
    {"autoscaling": 3},
    {"served_as": 5},
    {"served_as": [None, {}]},
    {"adapters": 1},
    {"adapters": [{"name": ["x"], "path": "p"}]},
    {"model": None},
    {"engine": [1]},
    {"engine": {"max_model_len": {"a": 1}, "tensor_parallel_size": [None]}},
    {"env": 7},
]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=str)
def test_nonsense_in_one_model_costs_only_that_one(nonsense: dict[str, Any]) -> None:
    models = read(bad=reported(nonsense, status="DEPLOY_FAILED"), good=reported())
    assert (models["bad"].ids, models["bad"].must_be_up) == (("bad",), True)
    assert models["good"].up


def test_nonsense_in_user_config_costs_only_that_one() -> None:
    bad = reported({"served_as": ["org/x"]})
    bad["deployed_app_config"]["deployments"] = [
        {"name": "ModelServer", "user_config": {"adapters": 5}}
    ]
    models = read(bad=bad, good=reported())
    assert models["bad"].ids == ("bad", "org/x")
    assert models["bad"].up and models["good"].up


def test_a_model_whose_update_is_nonsense_keeps_the_ids_that_its_replicas_have() -> None:
    args = {"served_as": ["org/x"], "autoscaling": {"min_replicas": 0}}
    before = read(x=reported(args))
    update = reported({"served_as": 5, "model": "other"}, status="DEPLOY_FAILED")
    [model] = read_details({"applications": {"x": update}}, before).values()
    assert (model.ids, model.root, model.must_be_up) == (("x", "org/x"), "org/model", False)
    assert model.broken


def test_a_wrong_user_config_is_said_while_the_replicas_keep_their_adapters() -> None:
    application = reported({"engine": {"enable_lora": True}})
    live = {"name": "ModelServer", "user_config": {"adapters": [{"name": "lora", "path": "p"}]}}
    application["deployed_app_config"]["deployments"] = [live]
    before = read(m=application)
    assert (before["m"].adapters, before["m"].message) == (("lora",), "")
    wrong = {"adaptors": [{"name": "lora", "path": "p2"}]}
    application = copy.deepcopy(application)  # Ray makes each report anew
    application["deployed_app_config"]["deployments"] = [live | {"user_config": wrong}]
    [model] = read_details({"applications": {"m": application}}, before).values()
    assert (model.adapters, model.up) == (("lora",), True)
    expected = "application 'm': user_config: 'adaptors' is not a setting; did you mean 'adapters'?"
    assert model.message.startswith(expected)


def test_what_user_config_sets_takes_the_place_of_the_args() -> None:
    lora = {"name": "lora", "path": "p"}
    affinity = {"session_affinity": True}
    application = reported({"fallback": ["a"], "adapters": [lora], "routing": affinity})
    live = {"fallback": ["b"], "fallback_after_s": 1, "routing": {"policy": "least_loaded"}}
    application["deployed_app_config"]["deployments"] = [
        {"name": "ModelServer", "user_config": live}
    ]
    [model] = read(m=application).values()
    assert model.config is not None
    assert (model.config.fallback, model.config.fallback_after_s) == (["b"], 1)
    assert model.config.routing is not None
    assert model.config.routing.policy == "least_loaded"
    assert model.adapters == ("lora",)


def test_settings_are_read_again_only_where_they_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report comes every second, and reading 200 models' settings takes 10 ms."""
    read_again: list[str] = []

    def counted(name: str, given: dict[str, Any], before: Model | None) -> Any:
        read_again.append(name)
        return settings(name, given, before)

    settings = directory._settings
    monkeypatch.setattr(directory, "_settings", counted)
    told = {f"m{n}": reported() for n in range(20)}
    before = read_details({"applications": copy.deepcopy(told)})
    assert len(read_again) == 20
    told["m7"] = reported({"served_as": ["org/x"]})
    now = read_details({"applications": copy.deepcopy(told)}, before)
    assert read_again[20:] == ["m7"]
    assert now["m7"].ids == ("m7", "org/x") and now["m8"] == before["m8"]


def test_settings_that_were_refused_are_read_again() -> None:
    before = read(m=reported({"served_as": 5}))
    [again] = read_details({"applications": {"m": reported({"served_as": 5})}}, before).values()
    assert again.message == before["m"].message != ""


async def test_a_look_that_takes_long_is_taken_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gateway may take a twentieth of the controller's time."""
    clock, takes, slept = [0.0], iter([0.004, 0.1, 3.0]), list[float]()

    async def report() -> None:
        clock[0] += next(takes)

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 4:
            raise asyncio.CancelledError

    monkeypatch.setattr(directory.serve, "report_async", report)
    monkeypatch.setattr(directory, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(directory, "asyncio", SimpleNamespace(sleep=sleep))
    with pytest.raises(asyncio.CancelledError):
        await directory.Directory(cast(Any, None)).run()
    assert slept == pytest.approx([1.0, 1.0, 2.0, 10.0])


# --- what clients see of it --------------------------------------------------------------------


def failed(message: str) -> dict[str, Any]:
    return reported(status="DEPLOY_FAILED") | {"message": message, "deployments": {}}


SENTENCE = "args: engine.max_modl_len is not an argument of vLLM 0.29.0"


async def test_a_broken_model_is_not_listed_and_says_why_to_who_asks_for_it() -> None:
    applications = {"m": reported(), "bad": failed(f"serve_app.errors.ConfigError: {SENTENCE}")}
    async with GatewayProcess(applications=applications) as gateway:
        listed = await gateway.client.get("/v1/models")
        assert [m["id"] for m in listed.json()["data"]] == ["m"]
        answer = await gateway.client.post(CHAT, json={"model": "bad"})
        assert answer.status_code == 503
        assert SENTENCE in answer.json()["error"]["message"]
        ready = await gateway.client.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["waiting_for"] == ["bad"]
        assert ready.json()["models"]["bad"] == {
            "status": "DEPLOY_FAILED",
            "replicas": 0,
            "message": SENTENCE,
            "starting": [],
            "queued": 0,
            "longest_wait_s": 0.0,
            "asleep": False,
        }


async def test_a_model_whose_update_failed_is_listed_as_long_as_it_serves() -> None:
    async with GatewayProcess(applications={"m": reported(status="DEPLOY_FAILED")}) as gateway:
        listed = await gateway.client.get("/v1/models")
        assert [m["id"] for m in listed.json()["data"]] == ["m"]
        assert (await gateway.client.get("/ready")).json()["waiting_for"] == ["m"]


async def test_a_traceback_is_cut_down_to_its_sentence() -> None:
    frames = 'Traceback (most recent call last):\n  File "x.py", line 1'
    trace = f"{frames}\nserve_app.errors.UserError: {SENTENCE}\n"
    async with GatewayProcess(applications={"bad": failed(trace)}) as gateway:
        ready = (await gateway.client.get("/ready")).json()
    assert ready["models"]["bad"]["message"] == SENTENCE


async def test_no_model_at_all_is_not_ready() -> None:
    async with GatewayProcess(applications={"x": reported(status="DELETING")}) as gateway:
        ready = await gateway.client.get("/ready")
        assert (ready.status_code, ready.json()["models"]) == (503, {})
        answer = await gateway.client.post(CHAT, json={"model": "x"})
        assert "Available: none yet" in answer.json()["error"]["message"]
        assert (await gateway.client.get("/v1/models")).json()["data"] == []
        assert (await gateway.client.get("/health")).status_code == 200


async def test_an_adapter_is_listed_with_its_base_model_as_parent() -> None:
    args = {"model": "org/base", "adapters": [{"name": "lora", "path": "p"}]}
    async with GatewayProcess(applications={"m": reported(args)}) as gateway:
        cards = (await gateway.client.get("/v1/models")).json()["data"]
    assert [(c["id"], c["parent"]) for c in cards] == [("m", None), ("lora", "m")]


UNREADABLE = {"max_model_len": ["x"]}


@pytest.mark.parametrize(
    ("engine", "reported_by_replica", "listed"),
    [
        ({"max_model_len": 4096}, None, 4096),
        ({"max_model_len": "8k"}, None, 8000),
        ({"max_model_len": "8K"}, 4, 8192),
        ({"max_model_len": "auto"}, 1234, 1234),
        ({"max_model_len": -1}, 1234, 1234),
        ({"max_model_len": -1}, None, None),
        (UNREADABLE, None, None),
        ({}, 40960, 40960),
        ({}, None, None),
        (None, None, None),
        ("nonsense", None, None),
    ],
)
async def test_a_card_says_how_many_tokens_the_model_takes_where_that_is_known(
    engine: Any, reported_by_replica: int | None, listed: int | None
) -> None:
    """By the config, or by a replica. LiteLLM takes its limits from there."""
    args = {"engine": engine, "adapters": [{"name": "lora", "path": "p"}]}
    async with GatewayProcess(applications={"m": reported(args)}) as gateway:
        watcher = Watcher(gateway.board, "ModelServer")
        watcher._clients["m"] = cast(Any, None)
        place = {"host": "127.0.0.1", "port": 1}
        if reported_by_replica:
            place["max_model_len"] = reported_by_replica
        replica = SimpleNamespace(
            replica_id=SimpleNamespace(unique_id="r0"), replica_metadata=place
        )
        watcher._publish("m", SimpleNamespace(running_replicas=[replica]))
        watcher._publish("m", SimpleNamespace(running_replicas=[]))  # scaled to zero
        cards = (await gateway.client.get("/v1/models")).json()["data"]
    ids = ["m", "lora"] if isinstance(engine, dict) and engine != UNREADABLE else ["m"]
    assert [(c["id"], c["max_model_len"]) for c in cards] == [(id, listed) for id in ids]
    assert all(c["permission"] == [] for c in cards)


def test_a_new_alias_is_announced_when_every_replica_knows_it() -> None:
    args = {"served_as": ["old", "new"], "adapters": [{"name": "lora", "path": "p"}]}
    model = read_details({"applications": {"m": reported(args)}})["m"]

    def replica(id: str, **metadata: Any) -> Any:
        place = {"host": "127.0.0.1", "port": 1}
        return SimpleNamespace(
            replica_id=SimpleNamespace(unique_id=id), replica_metadata=place | metadata
        )

    before, after = replica("r0", ids=["m", "old"]), replica("r1", ids=["m", "old", "new"])
    watcher = Watcher(Board(), "ModelServer")
    watcher._clients["m"] = cast(Any, None)
    for running, announced in (
        ([], ("m", "old", "new", "lora")),  # the first replica that starts will know all
        ([before], ("m", "old", "lora")),
        ([before, after], ("m", "old", "lora")),
        ([after], ("m", "old", "new", "lora")),
        ([after, replica("r2")], ("m", "old", "new", "lora")),  # of an image that does not tell
    ):
        watcher._publish("m", SimpleNamespace(running_replicas=running))
        assert directory._announced(model, watcher.ids("m")).ids == announced


async def test_a_working_model_keeps_an_alias_that_a_broken_one_claims() -> None:
    claims = reported({"served_as": ["z"]})["deployed_app_config"]
    applications = {
        "bad": failed("x") | {"deployed_app_config": claims},
        "good": reported({"model": "right", "served_as": ["z"]}),
    }
    async with GatewayProcess(applications=applications) as gateway:
        card = (await gateway.client.get("/v1/models/z")).json()
    assert card["root"] == "right"


async def test_a_name_beats_an_alias() -> None:
    applications = {
        "a": reported({"model": "wrong", "served_as": ["b"]}),
        "b": reported({"model": "right"}),
    }
    async with GatewayProcess(applications=applications) as gateway:
        assert (await gateway.client.get("/v1/models/b")).json()["root"] == "right"


# --- the board of front ends -------------------------------------------------------------------


def board(*ids: str) -> Board:
    board = Board()
    board.publish("m", dict.fromkeys(ids, ("127.0.0.1", 1)))
    return board


def known(board: Board) -> dict[str, FrontEnd]:
    return board._front_ends["m"]


def chosen(board: Board, times: int = 50) -> set[str]:
    return {choose(board).id for _ in range(times)}


def choose(board: Board) -> FrontEnd:
    return FewestRequests().choose(board.live("m"), cast(Any, None))


def test_nothing_is_live_where_nothing_runs() -> None:
    assert Board().live("m") == []
    assert board().live("m") == []


def test_ties_are_broken_at_random() -> None:
    assert chosen(board("a", "b", "c"), 200) == {"a", "b", "c"}
    assert chosen(board("a", "a-1", "b", "b-1"), 200) == {"a", "a-1", "b", "b-1"}


def test_the_replica_with_the_fewest_requests_is_chosen() -> None:
    three = board("a", "b", "c")
    for id, requests in {"a": 2, "b": 1, "c": 3}.items():
        for _ in range(requests):
            known(three)[id].began()
    assert chosen(three) == {"b"}


def test_of_its_front_ends_the_one_with_the_fewest_requests_is_chosen() -> None:
    two = board("a", "a-1", "b")
    known(two)["b"].began()
    known(two)["b"].began()
    known(two)["a"].began()
    assert chosen(two) == {"a-1"}
    known(two)["a-1"].began()  # now both replicas have two
    assert chosen(two, 200) == {"a", "a-1"}
    for front_end in ("a", "a-1"):
        known(two)[front_end].ended()
        known(two)[front_end].began()
    known(two)["a"].began()
    assert chosen(two) == {"b"}  # its front end has more than a-1, its engine less to do


def test_what_is_running_is_remembered_when_the_list_changes() -> None:
    one = board("a", "b")
    front_end = known(one)["a"]
    front_end.began()
    one.publish("m", {"a": ("127.0.0.1", 1), "c": ("127.0.0.1", 2)})
    known(one)["c"].replica.standing.since -= SLOW_START_S  # it is new no more
    assert chosen(one) == {"c"}
    assert known(one)["a"] is front_end


def test_a_front_end_that_failed_is_avoided_for_a_while() -> None:
    two = board("a", "b")
    first = choose(two)
    two.avoid(first)
    assert chosen(two) == {"a", "b"} - {first.id}
    first.replica.now = lambda: 10.0**9
    assert chosen(two) == {"a", "b"}


def test_a_report_finds_its_replica_without_a_look_at_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    board = Board()
    for n in range(50):
        board.publish(f"m{n}", {f"r{n}": ("h", 1), f"r{n}-1": ("h", 2)})
    [last, _] = [it for name, it in board.all() if name == "m49"]
    looks: list[str] = []

    def counted(front_end: FrontEnd) -> Any:
        looks.append(front_end.id)
        return vars(front_end)["replica"]

    monkeypatch.setattr(FrontEnd, "replica", property(counted), raising=False)
    changed: list[str] = []
    board.changed = changed.append
    board.report("r49", Load(3, 0, 8, 0.5))
    assert (changed, last.replica.load) == (["m49"], Load(3, 0, 8, 0.5))
    assert {*looks} <= {"r49"}
    looks.clear()
    assert board.has(last) and board.application_of("r49-1") == "m49"
    assert {*looks} <= {"r49"}


def test_what_serve_reports_no_more_is_not_known() -> None:
    board = Board()
    board.publish("m", {"a": ("h", 1), "a-1": ("h", 2), "b": ("h", 3)})
    front_ends = dict(board._front_ends["m"])
    board.publish("m", {"b": ("h", 3)})
    board.report("a", Load(3, 0, 8, 0.5))
    assert front_ends["a"].replica.load is None
    assert [board.has(front_ends[id]) for id in ("a", "a-1", "b")] == [False, False, True]
    assert [board.application_of(id) for id in ("a", "a-1", "b", "b-1")] == [None, None, "m", None]
    board.publish("m", {"a": ("h", 4), "b": ("h", 3)})  # another front end of this id
    assert not board.has(front_ends["a"])
    board.forget("m")
    assert not board.has(front_ends["b"]) and board.application_of("b") is None
    [again] = board.add("n", {"b": ("h", 5)})  # which a handle has named
    assert board.has(again) and board.application_of("b") == "n"


def test_with_the_second_front_end_that_failed_the_replica_is_lost() -> None:
    two = board("a", "a-1", "a-2", "b")
    two.avoid(known(two)["a-1"])
    assert chosen(two, 200) == {"a", "a-2", "b"}
    two.avoid(known(two)["a-2"])
    assert chosen(two) == {"b"}
    assert two.application_of("a") == "m"


def test_a_replica_that_sleeps_does_so_with_all_its_front_ends() -> None:
    two = board("a", "a-1", "b")
    two.asleep(known(two)["a-1"])
    assert chosen(two) == {"b"}
    assert not two.all_asleep("m")
    two.asleep(known(two)["b"])
    assert two.all_asleep("m")


def test_the_only_replica_that_failed_is_avoided_too() -> None:
    one = board("a")
    [front_end] = one.live("m")
    one.avoid(front_end)
    assert one.live("m") == []
    assert one.add("m", {"a": ("127.0.0.1", 1)}) == []
    added = one.add("m", {"new": ("127.0.0.1", 2), "new-1": ("127.0.0.1", 3)})
    assert [it.id for it in added] == ["new", "new-1"]
    assert added == one.live("m")


def test_a_removed_application_has_no_replicas() -> None:
    one = board("a")
    one.forget("m")
    assert one.live("m") == []


@pytest.mark.parametrize(
    ("ports", "front_ends"),
    [
        ({"ports": [1, 5, 6]}, {"r": ("h", 1), "r-1": ("h", 5), "r-2": ("h", 6)}),
        ({}, {"r": ("h", 1)}),  # of an image before front ends
    ],
)
def test_each_front_end_of_a_replica_has_its_port(
    ports: dict[str, Any], front_ends: dict[str, tuple[str, int]]
) -> None:
    assert addresses("r", {"host": "h", "port": 1, **ports}) == front_ends
