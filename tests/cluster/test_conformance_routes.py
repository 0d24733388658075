"""The other routes of vLLM's app through the gateway, and the gateway's own."""

from __future__ import annotations

import math
from typing import Any

import httpx
import openai
import pytest
from harness.processes import REPO, eventually
from harness.servers import CHAT, CHAT_ALIASES, EMBED, EMBED_ALIASES, BareVllm, Cluster
from openai.types import Model
from transformers import AutoTokenizer

from serve_app.replica.start import progress
from serve_app.replica.start.plugin import LINES

IDS = [CHAT, *CHAT_ALIASES, EMBED, *EMBED_ALIASES]


# --- models --------------------------------------------------------------------------------


def test_every_id_and_alias_is_listed(client: openai.OpenAI) -> None:
    assert sorted(m.id for m in client.models.list()) == sorted(IDS)


@pytest.mark.parametrize("id", IDS)
def test_a_model_is_retrieved_by_each_of_its_ids(client: openai.OpenAI, id: str) -> None:
    model = client.models.retrieve(id)
    assert isinstance(model, Model)
    assert (model.id, model.object) == (id, "model")
    assert model in list(client.models.list())


def test_an_id_with_a_slash_is_retrieved_as_it_is_written(http: httpx.Client) -> None:
    """curl users do not quote the slash."""
    quoted = http.get(f"/v1/models/{CHAT_ALIASES[0].replace('/', '%2F')}")
    plain = http.get(f"/v1/models/{CHAT_ALIASES[0]}")
    assert plain.status_code == 200
    assert plain.json() == quoted.json()


@pytest.mark.parametrize("id", [CHAT, *CHAT_ALIASES])
def test_chat_answers_to_every_id_of_the_model(client: openai.OpenAI, id: str) -> None:
    answer = client.chat.completions.create(
        model=id,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
    )
    assert "Paris" in (answer.choices[0].message.content or "")


def test_ready_lists_every_model_and_health_is_well(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    ready = http.get("/ready")
    assert ready.status_code == 200
    assert ready.json()["waiting_for"] == []
    assert {name: (m["status"], m["replicas"]) for name, m in ready.json()["models"].items()} == {
        CHAT: ("RUNNING", 1),
        EMBED: ("RUNNING", 1),
    }


@pytest.mark.parametrize("model", [CHAT, EMBED])
def test_ready_told_what_a_start_was_doing(cluster: Cluster, model: str) -> None:
    phases = set(cluster.phases[model])
    assert progress.FIRST in phases  # vLLM is imported: many seconds
    assert phases & set(LINES.values()), phases
    assert phases <= {"starting the process", progress.FIRST, *LINES.values()}


def test_the_fleet_tells_what_each_model_takes_and_how_its_engine_is(http: httpx.Client) -> None:
    def loads() -> list[Any]:
        models = http.get("/fleet").json()["models"]
        return [replica["load"] for it in models.values() for replica in it["replicas"]]

    assert eventually(lambda: len(loads()) == 2 and all(loads()))
    models = http.get("/fleet").json()["models"]
    assert {"chat", "completions"} <= set(models[CHAT]["takes"])
    assert "embeddings" in models[EMBED]["takes"]
    assert "chat" not in models[EMBED]["takes"]
    for name, ids in ((CHAT, CHAT_ALIASES), (EMBED, EMBED_ALIASES)):
        assert models[name]["ids"] == [name, *ids]
        assert not models[name]["asleep"]
        assert models[name]["replicas"][0]["load"]["capacity"] > 0
        assert models[name]["memory"] is None  # it is on a CPU


@pytest.mark.parametrize(
    "path", ["/", "/health", "/ready", "/fleet", "/v1/models", f"/v1/models/{CHAT}"]
)
def test_head_is_get_without_the_body(http: httpx.Client, path: str) -> None:
    head, get = http.head(path), http.get(path)
    assert head.status_code == get.status_code == 200
    assert head.content == b"" != get.content


def test_the_query_names_the_model_where_there_is_no_body(http: httpx.Client) -> None:
    answer = http.get("/version", params={"model": CHAT_ALIASES[0]})
    assert answer.json() == {"version": "0.29.0"}


# --- tokens --------------------------------------------------------------------------------


def test_tokens_are_those_of_the_tokenizer_and_lead_back_to_the_text(http: httpx.Client) -> None:
    text = "Ein 世界 ist 😀, naïve 🇫🇷!"
    tokenizer = AutoTokenizer.from_pretrained(REPO / "models/smollm2-135m-instruct")
    found = http.post("/tokenize", json={"model": CHAT, "prompt": text}).json()
    assert found["tokens"] == tokenizer.encode(text)
    assert found["count"] == len(found["tokens"])
    back = http.post("/detokenize", json={"model": CHAT, "tokens": found["tokens"]}).json()
    assert back["prompt"] == text


def test_a_4_mb_body_is_tokenized(http: httpx.Client) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 93_000
    assert len(text) > 4_000_000
    tokenizer = AutoTokenizer.from_pretrained(REPO / "models/smollm2-135m-instruct")
    answer = http.post("/tokenize", json={"model": CHAT, "prompt": text})
    assert answer.status_code == 200, answer.text[:500]
    # The prompt is one sentence again and again, and so are its tokens.
    once = len(tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 2))
    thrice = len(tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 3))
    assert answer.json()["count"] == once + 92_998 * (thrice - once)


# --- embeddings ----------------------------------------------------------------------------


def test_embeddings_have_the_models_dimension_and_put_like_near_like(
    client: openai.OpenAI,
) -> None:
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose again."]
    answer = client.embeddings.create(model=EMBED, input=texts)
    assert [d.index for d in answer.data] == [0, 1, 2]
    cat, kitten, rates = (d.embedding for d in answer.data)
    assert len(cat) == 384
    assert math.isclose(math.hypot(*cat), 1, abs_tol=1e-5)
    assert dot(cat, kitten) > 0.5 > 0.2 > dot(cat, rates)


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


POOLED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/embeddings", {"input": "Paris is a city."}),
    ("/v1/embeddings", {"input": "Paris is a city.", "encoding_format": "base64"}),
    ("/pooling", {"input": "Paris is a city."}),
    ("/score", {"text_1": "cat", "text_2": ["kitten", "bank"]}),
    ("/v1/score", {"text_1": "cat", "text_2": "kitten"}),
    ("/rerank", {"query": "cat", "documents": ["bank", "kitten"]}),
    ("/v1/rerank", {"query": "cat", "documents": ["bank", "kitten"]}),
    ("/v2/rerank", {"query": "cat", "documents": ["bank", "kitten"]}),
    ("/v2/embed", {"texts": ["Paris is a city."], "embedding_types": ["float"]}),
    ("/tokenize", {"prompt": "Paris is a city."}),
]


@pytest.mark.parametrize(("path", "body"), POOLED, ids=lambda v: v if isinstance(v, str) else "")
def test_the_embedding_models_routes_answer_as_bare_vllm_does(
    http: httpx.Client, bare_embed: BareVllm, path: str, body: dict[str, Any]
) -> None:
    request = {"model": EMBED, **body}
    ours = http.post(path, json=request)
    theirs = httpx.post(bare_embed.base_url + path, json=request)
    assert ours.status_code == theirs.status_code == 200, ours.text
    assert stable(ours.json()) == stable(theirs.json())


def stable(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer less what belongs to this one request."""
    return {k: v for k, v in answer.items() if k not in ("id", "created")}


def test_reranking_puts_the_closest_document_first(http: httpx.Client) -> None:
    documents = ["the price of gold", "a kitten", "monetary policy"]
    request = {"model": EMBED, "query": "cat", "documents": documents, "top_n": 1}
    [best] = http.post("/rerank", json=request).json()["results"]
    assert best["document"]["text"] == "a kitten"
