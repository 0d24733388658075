"""Models that come, go, sleep and fail on a running cluster, seen from the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import yaml
from harness import servers
from harness.processes import eventually
from harness.servers import CHAT, CHAT_ALIASES, EMBED, EMBED_ALIASES, Cluster

from serve_app.cluster import serve
from serve_app.cluster.serve import Application

# The gateway and the directory are the same behind either proxy.
pytestmark = pytest.mark.parametrize("cluster", ["python"], indirect=True, scope="session")

SLEEPER, BROKEN, THIEF = "sleeper:0.1", "broken", "thief"
SLEEPERS_ALIAS = "team/sleeper"


def sleeper() -> dict[str, Any]:
    """A model that is scaled to zero until someone asks for it."""
    args = servers.demo_args("all-minilm-l6-v2")
    scaling = {"min_replicas": 0, "max_replicas": 1}
    return servers.application(
        SLEEPER, **args | {"served_as": [SLEEPERS_ALIAS], "autoscaling": scaling}
    )


def broken() -> dict[str, Any]:
    return servers.application(BROKEN, model="any", engine={"max_modl_len": 1})


def thief() -> dict[str, Any]:
    return servers.application(THIEF, model="any", served_as=["own-name", CHAT_ALIASES[0]])


def serves_report() -> dict[str, Application]:
    """The applications as Serve's controller reports them."""
    return serve.applications(serve.report(timeout_s=30) or {})


def replica_ids(name: str) -> list[str]:
    return [replica.id for replica in serves_report()[name].replicas]


def listed(cluster: Cluster) -> set[str]:
    return {m["id"] for m in httpx.get(f"{cluster.base_url}/v1/models").json()["data"]}


@pytest.fixture(scope="module")
def grown(
    cluster: Cluster,
) -> Iterator[dict[str, list[str]]]:
    """The cluster with three more models, of which one works; the replicas from before."""
    before = yaml.safe_load(cluster.config.read_text())
    replicas = {name: replica_ids(name) for name in (CHAT, EMBED)}
    more = [sleeper(), broken(), thief()]
    cluster.deploy(before | {"applications": [*before["applications"], *more]})
    yield replicas

    gone = {SLEEPER, BROKEN, THIEF}
    cluster.deploy(before)
    assert eventually(lambda: not gone & serves_report().keys(), within_s=60)
    # What the gateway promises: five seconds after Serve says so.
    assert eventually(lambda: listed(cluster) == ALWAYS, within_s=5)
    answer = httpx.post(f"{cluster.base_url}/v1/embeddings", json={"model": SLEEPER, "input": "x"})
    assert answer.status_code == 404
    cluster.wait_until_ready(30)


ALWAYS = {CHAT, *CHAT_ALIASES, EMBED, *EMBED_ALIASES}


def test_a_new_model_is_listed_within_seconds_of_serves_report(
    cluster: Cluster, grown: dict[str, list[str]]
) -> None:
    assert eventually(lambda: SLEEPER in serves_report(), within_s=60)
    assert eventually(lambda: {SLEEPER, SLEEPERS_ALIAS} <= listed(cluster), within_s=5)


def test_the_models_from_before_serve_on_with_the_same_replicas(
    cluster: Cluster, grown: dict[str, list[str]]
) -> None:
    answer = httpx.post(
        f"{cluster.base_url}/v1/chat/completions",
        json={
            "model": CHAT,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
        },
        timeout=60,
    )
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]
    assert {name: replica_ids(name) for name in (CHAT, EMBED)} == grown


def test_a_model_whose_settings_are_wrong_fails_alone_and_says_why(
    cluster: Cluster, grown: dict[str, list[str]]
) -> None:
    sentence = (
        "args: engine.max_modl_len is not an argument of vLLM 0.29.0; did you mean 'max_model_len'?"
    )
    # The gateway says what is wrong with the settings before Serve has refused them.
    assert eventually(lambda: status_of(cluster, BROKEN) == "DEPLOY_FAILED", within_s=90)
    status, ready = cluster.ready()
    assert status == 503
    assert ready["models"][BROKEN]["message"] == sentence
    assert BROKEN in ready["waiting_for"]
    assert not {CHAT, EMBED, SLEEPER} & set(ready["waiting_for"])
    assert BROKEN not in listed(cluster)

    answer = httpx.post(f"{cluster.base_url}/v1/completions", json={"model": BROKEN, "prompt": "x"})
    assert answer.status_code == 503
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert sentence in error["message"]


def test_an_alias_that_another_model_has_is_refused_naming_both(
    cluster: Cluster, grown: dict[str, list[str]]
) -> None:
    assert eventually(lambda: message_of(cluster, THIEF), within_s=90)
    message = message_of(cluster, THIEF)
    assert message.startswith(f"the model id '{CHAT_ALIASES[0]}' belongs to both ")
    assert f"'{THIEF}'" in message and f"'{CHAT}'" in message
    card = httpx.get(f"{cluster.base_url}/v1/models/{CHAT_ALIASES[0]}").json()
    assert card["root"] == "models/smollm2-135m-instruct"


def status_of(cluster: Cluster, name: str) -> str:
    return str(cluster.ready()[1].get("models", {}).get(name, {}).get("status", ""))


def message_of(cluster: Cluster, name: str) -> str:
    return str(cluster.ready()[1].get("models", {}).get(name, {}).get("message", ""))


def test_requests_wake_one_replica_of_a_model_that_is_scaled_to_zero(
    cluster: Cluster, grown: dict[str, list[str]]
) -> None:
    assert eventually(lambda: state_of(cluster, SLEEPER) == ("RUNNING", 0), within_s=60)
    assert SLEEPER not in cluster.ready()[1]["waiting_for"]
    request = {"model": SLEEPERS_ALIAS, "input": "Paris"}

    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{cluster.base_url}/v1/embeddings", json=request, timeout=300)

    with ThreadPoolExecutor() as pool:
        woken = list(pool.map(ask, range(4)))
    assert [answer.status_code for answer in woken] == [200] * 4, woken[0].text
    other = httpx.post(f"{cluster.base_url}/v1/embeddings", json=request | {"model": EMBED})
    assert woken[0].json()["data"] == other.json()["data"]
    assert eventually(lambda: state_of(cluster, SLEEPER) == ("RUNNING", 1))


def state_of(cluster: Cluster, name: str) -> tuple[str, int]:
    model = cluster.ready()[1]["models"].get(name, {})
    return model.get("status", ""), model.get("replicas", 0)
