"""Connections, headers, many streams at once, and clients that go away."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from harness.processes import eventually
from harness.servers import CHAT, EMBED, Cluster, ModelPort

RUNNING = "vllm:num_requests_running"
GENERATED = "vllm:generation_tokens_total"
LONG: Any = {
    "model": CHAT,
    "messages": [{"role": "user", "content": "Count."}],
    "max_tokens": 1900,
    "min_tokens": 1900,
}
SHORT: Any = {"model": CHAT, "messages": LONG["messages"], "max_tokens": 2}


# --- clients that go away --------------------------------------------------------------------


def running(port: ModelPort) -> float:
    return port.metric(RUNNING) + port.metric("vllm:num_requests_waiting")


def freed(port: ModelPort) -> bool:
    """Wait until nothing runs; how long that took is printed, and not asserted."""
    began = time.monotonic()
    done = eventually(lambda: running(port) == 0)
    print(f"the engine was free {time.monotonic() - began:.2f} s after its client had gone")
    return done


def long_stream(client: openai.OpenAI) -> Any:
    more = {"min_tokens": LONG["min_tokens"]}
    asked = {k: v for k, v in LONG.items() if k not in more}
    return client.chat.completions.create(**asked, extra_body=more, stream=True)


def test_a_client_that_leaves_a_stream_frees_the_engine(
    client: openai.OpenAI, chat_port: ModelPort
) -> None:
    before = chat_port.metric(GENERATED)
    stream = long_stream(client)
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    assert running(chat_port) == 1
    stream.close()
    assert freed(chat_port)
    assert chat_port.metric(GENERATED) - before < LONG["max_tokens"]


def test_a_client_that_leaves_before_the_answer_frees_the_engine(
    cluster: Cluster, chat_port: ModelPort
) -> None:
    for _ in range(5):  # an HAProxy that splices notices some that leave, and others not
        before = chat_port.metric(GENERATED)
        connection = http.client.HTTPConnection("127.0.0.1", cluster.port)
        connection.request("POST", "/v1/chat/completions", json.dumps(LONG), JSON)
        assert eventually(lambda: running(chat_port) == 1)
        connection.close()
        assert freed(chat_port)
        assert chat_port.metric(GENERATED) - before < LONG["max_tokens"]


def test_a_client_that_leaves_in_the_middle_of_its_body_harms_nothing(
    cluster: Cluster, client: openai.OpenAI
) -> None:
    with socket.create_connection(("127.0.0.1", cluster.port)) as half:
        half.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{"
        )
    assert client.chat.completions.create(**SHORT).choices


JSON = {"content-type": "application/json"}


# --- many at once ----------------------------------------------------------------------------


async def test_64_parallel_streams_all_come_to_their_end(
    cluster: Cluster, chat_port: ModelPort
) -> None:
    client = openai.AsyncOpenAI(
        base_url=f"{cluster.base_url}/v1", api_key="-", max_retries=0, timeout=300
    )

    async def one(number: int) -> tuple[int, str | None]:
        tokens, finish = 0, None
        stream = await client.chat.completions.create(
            model=CHAT,
            messages=[{"role": "user", "content": f"Write a poem about the number {number}."}],
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
            if chunk.choices and chunk.choices[0].finish_reason:
                finish = chunk.choices[0].finish_reason
        return tokens, finish

    async with client:
        ends = await asyncio.gather(*(one(n) for n in range(64)))
    assert set(ends) == {(24, "length")}
    assert eventually(lambda: running(chat_port) == 0)


def test_two_models_answer_at_once(cluster: Cluster, client: openai.OpenAI) -> None:
    stream = long_stream(client)
    next(iter(stream))
    vector = client.embeddings.create(model=EMBED, input="Paris").data[0].embedding
    assert len(vector) == 384
    assert next(iter(stream)).choices  # the chat goes on
    stream.close()


# --- request ids -----------------------------------------------------------------------------


def test_a_request_id_is_kept_passed_on_and_given_back_once(cluster: Cluster) -> None:
    answer = httpx.post(
        f"{cluster.base_url}/v1/chat/completions",
        json=SHORT,
        headers={"x-request-id": "my-own.id_42"},
        timeout=60,
    )
    assert answer.headers.get_list("x-request-id") == ["my-own.id_42"]
    assert answer.json()["id"] == "chatcmpl-my-own.id_42"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_id_is_made_where_the_client_sent_none(cluster: Cluster, stream: bool) -> None:
    url = f"{cluster.base_url}/v1/chat/completions"
    ids = set()
    for _ in range(2):
        answer = httpx.post(url, json={**SHORT, "stream": stream}, timeout=60)
        [id] = answer.headers.get_list("x-request-id")
        assert f'"id":"chatcmpl-{id}"' in answer.text
        ids.add(id)
    assert len(ids) == 2


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nothing"])
def test_the_gateways_own_answers_have_a_request_id_too(cluster: Cluster, path: str) -> None:
    answer = httpx.get(cluster.base_url + path, headers={"x-request-id": "abc"})
    assert answer.headers.get_list("x-request-id") == ["abc"]


# --- headers ---------------------------------------------------------------------------------


def test_no_header_is_there_twice_and_none_is_of_a_single_hop(cluster: Cluster) -> None:
    url = f"{cluster.base_url}/v1/chat/completions"
    for stream in (False, True):
        answer = httpx.post(url, json={**SHORT, "stream": stream}, timeout=60)
        names = [k.lower() for k, _ in answer.headers.raw]
        assert len(names) == len(set(names)), names
        hop_by_hop = {b"connection", b"keep-alive", b"te", b"trailer", b"upgrade"}
        assert not hop_by_hop & set(names)
        assert b"transfer-encoding" not in names or b"content-length" not in names
        kind = "text/event-stream" if stream else "application/json"
        assert answer.headers["content-type"].startswith(kind)


def test_a_credential_of_the_clients_own_neither_helps_nor_harms(
    cluster: Cluster, chat_port: ModelPort
) -> None:
    for value in ("wrong", chat_port.credential):
        headers = {"x-serve-app-credential": value}
        answer = httpx.post(
            f"{cluster.base_url}/v1/chat/completions", json=SHORT, headers=headers, timeout=60
        )
        assert answer.status_code == 200
        assert chat_port.credential not in str(answer.headers.raw) + answer.text
        closed = httpx.get(f"{cluster.base_url}/load?model={CHAT}", headers=headers)
        assert closed.status_code == 404


def test_an_authorization_header_does_not_get_in_the_way(client: openai.OpenAI) -> None:
    """The SDK always sends one."""
    answer = client.with_options(api_key="sk-anything").chat.completions.create(**SHORT)
    assert answer.choices


# --- connections -----------------------------------------------------------------------------


def test_one_connection_serves_request_after_request(cluster: Cluster) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=60)
    connection.connect()
    socket_at_first = connection.sock
    bodies: list[tuple[dict[str, Any], int]] = [
        (SHORT, 200),
        ({**SHORT, "stream": True}, 200),
        ({**SHORT, "model": "nothing"}, 404),
        ({**SHORT, "temperature": -1}, 400),
        (SHORT, 200),
    ]
    for body, status in bodies:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status
        assert connection.sock is socket_at_first is not None
    connection.close()


def test_a_body_that_waits_for_100_continue_is_served(cluster: Cluster) -> None:
    body = json.dumps(SHORT).encode()
    with socket.create_connection(("127.0.0.1", cluster.port), timeout=60) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            b"content-type: application/json\r\nexpect: 100-continue\r\n"
            b"content-length: %d\r\n\r\n" % len(body)
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'"object":"chat.completion"' in answer


def test_threads_that_share_a_client_get_their_own_answers(client: openai.OpenAI) -> None:
    words = ["red", "green", "blue", "black"]
    found: dict[str, str] = {}

    def ask(word: str) -> None:
        answer = client.chat.completions.create(
            model=CHAT,
            messages=[{"role": "user", "content": "Name a colour."}],
            extra_body={"structured_outputs": {"choice": [word]}},
        )
        found[word] = answer.choices[0].message.content or ""

    threads = [threading.Thread(target=ask, args=(word,)) for word in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {word: word for word in words}
