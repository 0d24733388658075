"""Requests that name a stored response: they reach the replica that made it, or say why not."""

from __future__ import annotations

import json

import pytest
from harness.scripted import Exchange, GatewayProcess, Upstream, reported

from serve_app.cluster.response_ids import made_by, maker_of

VLLM_ID = "resp_" + "0123456789abcdef" * 2
TWO = {"m": reported({"served_as": ["org/m:1.0"]}), "other": reported()}


def test_an_id_tells_its_maker() -> None:
    assert maker_of(made_by(VLLM_ID, "ab12CD34")) == "ab12CD34"
    assert made_by(VLLM_ID, "r").startswith("resp_")


@pytest.mark.parametrize("id", [VLLM_ID, "mine", "resp_mine_r1", "", "resp_0_", "resp_0_r/x"])
def test_an_id_of_no_replica_tells_none(id: str) -> None:
    assert maker_of(id) is None


@pytest.mark.parametrize(
    ("method", "rest"), [("GET", ""), ("GET", "?stream=true&starting_after=3"), ("POST", "/cancel")]
)
async def test_it_reaches_the_replica_that_made_it(method: str, rest: str) -> None:
    """r0 has the fewest requests, so it is what the policy would choose."""
    async with Upstream() as a, Upstream() as b, GatewayProcess(a, b) as gateway:
        target = f"/v1/responses/{made_by(VLLM_ID, 'r1')}{rest}"
        for _ in range(3):
            answer = await gateway.client.request(method, target)
            assert answer.status_code == 200, answer.text
        assert not a.exchanges
        assert [(e.method, e.target) for e in b.exchanges] == [(method, target)] * 3


async def test_it_reaches_a_replica_of_whichever_model() -> None:
    async with Upstream() as a, Upstream() as b, GatewayProcess(a, applications=TWO) as gateway:
        gateway.board.publish("other", {"s0": (b.host, b.port)})
        answer = await gateway.client.get(f"/v1/responses/{made_by(VLLM_ID, 's0')}")
        assert answer.status_code == 200
        assert not a.exchanges and len(b.exchanges) == 1


async def test_a_conversation_goes_on_where_it_is_stored() -> None:
    async with Upstream() as a, Upstream() as b, GatewayProcess(a, b) as gateway:
        ask = {"model": "org/m:1.0", "previous_response_id": made_by(VLLM_ID, "r1"), "input": "x"}
        for _ in range(3):
            answer = await gateway.client.post("/v1/responses", json=ask)
            assert answer.status_code == 200
        assert not a.exchanges
        assert [json.loads(body) for body in b.bodies] == [ask] * 3


async def test_without_a_previous_response_any_replica_will_do() -> None:
    async with Upstream() as a, Upstream() as b, GatewayProcess(a, b) as gateway:
        for id in (None, 5, VLLM_ID, "mine"):  # vLLM has its own answers to those
            ask = {"model": "m", "previous_response_id": id, "input": "x"}
            assert (await gateway.client.post("/v1/responses", json=ask)).status_code == 200
        assert len(a.exchanges) == 4 and not b.exchanges


@pytest.mark.parametrize("replicas", [0, 1])
async def test_a_response_whose_replica_is_gone_is_not_found(replicas: int) -> None:
    """At once, also where the model has no replica: it is not woken for it."""
    gone = made_by(VLLM_ID, "gone")
    async with Upstream() as a, GatewayProcess(*[a] * replicas) as gateway:
        client = gateway.client
        for answer in (
            await client.get(f"/v1/responses/{gone}"),
            await client.post(f"/v1/responses/{gone}/cancel"),
            await client.post(
                "/v1/responses", json={"model": "m", "previous_response_id": gone, "input": "x"}
            ),
        ):
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (404, "response_not_found")
            assert gone in error["message"] and "has ended" in error["message"]
        assert not a.exchanges


async def test_one_of_another_model_is_not_found() -> None:
    async with Upstream() as a, Upstream() as b, GatewayProcess(a, applications=TWO) as gateway:
        gateway.board.publish("other", {"s0": (b.host, b.port)})
        ask = {"model": "m", "previous_response_id": made_by(VLLM_ID, "s0"), "input": "x"}
        answer = await gateway.client.post("/v1/responses", json=ask)
        assert answer.status_code == 404
        assert not a.exchanges and not b.exchanges


async def test_it_is_never_asked_of_another_replica() -> None:
    async def die(exchange: Exchange) -> None:
        exchange.die()

    async with Upstream() as a, Upstream(die) as b, GatewayProcess(a, b) as gateway:
        answer = await gateway.client.get(f"/v1/responses/{made_by(VLLM_ID, 'r1')}")
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert "failed a moment ago" in answer.json()["error"]["message"]
        assert not a.exchanges


async def test_what_vllm_says_of_it_is_relayed() -> None:
    said = b'{"error": {"message": "Response with id \'x\' not found.", "code": 404}}'

    async def not_found(exchange: Exchange) -> None:
        await exchange.answer(said, "content-type: application/json", status="404 Not Found")

    async with Upstream(not_found) as a, GatewayProcess(a) as gateway:
        answer = await gateway.client.get(f"/v1/responses/{made_by(VLLM_ID, 'r0')}")
        assert (answer.status_code, answer.content) == (404, said)


async def test_an_id_that_a_client_chose_needs_the_model() -> None:
    async with Upstream() as a, GatewayProcess(a) as gateway:
        assert (await gateway.client.get("/v1/responses/mine?model=m")).status_code == 200
        answer = await gateway.client.get("/v1/responses/mine")
        assert answer.status_code in (400, 404)
        assert "?model=" in answer.json()["error"]["message"]
        assert [e.target for e in a.exchanges] == ["/v1/responses/mine?model=m"]
