"""Text generation through the gateway with the real SDKs, and its equality with bare vLLM."""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

import anthropic
import httpx
import openai
import pytest
from harness.servers import CHAT, BareVllm, Cluster

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
TALE: Any = [{"role": "user", "content": "Tell me a short story about a fox and a river."}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather of a city", "parameters": CITY},
}


# --- chat ----------------------------------------------------------------------------------


def test_chat_knows_the_capital_of_france(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=CHAT, messages=QUESTION, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage and answer.usage.completion_tokens > 0


def test_a_stream_arrives_in_pieces_that_add_up_to_the_whole(client: openai.OpenAI) -> None:
    options: Any = {"model": CHAT, "messages": TALE, "temperature": 0, "max_tokens": 48}
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [
        c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content
    ]
    assert len(pieces) > 10
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage


def test_a_token_is_sent_on_before_the_next_one_exists(cluster: Cluster) -> None:
    """The first bytes are here while the engine still has most of the answer to write."""
    body = {
        "model": CHAT,
        "messages": TALE,
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    url = f"{cluster.base_url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=180) as answer:
        first = next(answer.iter_raw())
    written = [int(n) for n in re.findall(rb'"completion_tokens":(\d+)', first)]
    assert written and max(written) < 100


def test_logprobs_are_ordered_and_belong_to_the_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=CHAT, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3
    )
    choice = answer.choices[0]
    assert choice.logprobs and choice.logprobs.content
    tokens = choice.logprobs.content
    assert "".join(t.token for t in tokens).startswith(choice.message.content or "?")
    for token in tokens:
        best = [t.logprob for t in token.top_logprobs]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)
        assert token.logprob == best[0] <= 0  # greedy


def test_n_gives_that_many_different_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=CHAT, messages=TALE, n=3, temperature=1.0, seed=7, max_tokens=16
    )
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert len({c.message.content for c in answer.choices}) == 3


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=CHAT, messages=QUESTION, temperature=0, stop=["France"]
    )
    assert answer.choices[0].message.content == "The capital of "
    assert answer.choices[0].finish_reason == "stop"


def test_one_seed_gives_one_text_and_another_seed_another(client: openai.OpenAI) -> None:
    def text(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model=CHAT, messages=TALE, temperature=1.0, seed=seed, max_tokens=24
        )
        return answer.choices[0].message.content

    assert text(5) == text(5) != text(6)


def test_a_json_schema_is_kept(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=CHAT,
        messages=QUESTION,
        temperature=0,
        max_tokens=64,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "place", "schema": CITY, "strict": True},
        },
    )
    assert json.loads(answer.choices[0].message.content or "") == {"city": "Paris"}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_forced_tool_is_called_with_arguments_that_parse(
    client: openai.OpenAI, choice: Any
) -> None:
    answer = client.chat.completions.create(
        model=CHAT,
        messages=[{"role": "user", "content": "How is the weather in Rome?"}],
        tools=[WEATHER],
        tool_choice=choice,
        temperature=0,
        max_tokens=64,
    )
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def test_a_tool_call_is_streamed(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=CHAT,
        messages=[{"role": "user", "content": "How is the weather in Rome?"}],
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        temperature=0,
        max_tokens=64,
        stream=True,
    )
    calls = [c for chunk in stream for c in chunk.choices[0].delta.tool_calls or []]
    assert next(c.function.name for c in calls if c.function) == "get_weather"
    text = "".join(c.function.arguments or "" for c in calls if c.function)
    assert json.loads(text)["city"] in ("Paris", "Rome")


# --- the other dialects --------------------------------------------------------------------


def test_a_completion_goes_on_with_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=CHAT, prompt="The capital of France is", temperature=0, max_tokens=3, echo=True
    )
    assert answer.choices[0].text.startswith("The capital of France is Paris")


def test_a_list_of_prompts_gives_a_choice_for_each(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=CHAT, prompt=["One, two,", "Monday, Tuesday,"], temperature=0, max_tokens=4
    )
    assert [c.index for c in answer.choices] == [0, 1]
    assert " three" in answer.choices[0].text
    assert " Wednesday" in answer.choices[1].text


def test_a_response_and_its_events(client: openai.OpenAI) -> None:
    options: Any = {
        "model": CHAT,
        "input": "What is the capital of France?",
        "temperature": 0,
        "max_output_tokens": 32,
    }
    whole = client.responses.create(**options)
    assert "Paris" in whole.output_text
    events = list(client.responses.create(**options, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    pieces = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.output_text


def test_an_anthropic_message_and_its_events(claude: anthropic.Anthropic) -> None:
    options: Any = {
        "model": CHAT,
        "messages": QUESTION,
        "max_tokens": 32,
        "extra_body": {"temperature": 0},
    }
    whole = claude.messages.create(**options)
    [block] = whole.content
    assert block.type == "text" and "Paris" in block.text
    with claude.messages.stream(**options) as stream:
        pieces = list(stream.text_stream)
        last = stream.get_final_message()
    assert len(pieces) > 1
    assert "".join(pieces) == block.text
    assert last.stop_reason == whole.stop_reason == "end_turn"


def test_anthropic_counts_the_tokens_that_a_message_then_uses(claude: anthropic.Anthropic) -> None:
    counted = claude.messages.count_tokens(model=CHAT, messages=QUESTION)
    used = claude.messages.create(model=CHAT, messages=QUESTION, max_tokens=1)
    assert counted.input_tokens == used.usage.input_tokens > 0


# --- equality with bare vLLM ---------------------------------------------------------------


def both(cluster: Cluster, bare: BareVllm, path: str, body: dict[str, Any]) -> list[bytes]:
    """The bytes that the gateway and bare vLLM answer with, less the moment of creation.

    Both get the same request id, which is in the answer's id, and a salt of their own: what an
    engine has in its prefix cache changes the last digits of what it computes.
    """
    for _ in range(5):
        answers = once(cluster, bare, path, body)
        # vLLM merges tokens into one event where its front end falls behind, so where a stream is
        # cut into events is a matter of timing, on either side: the same bytes must come once.
        if answers[0] == answers[1] or not body.get("stream"):
            break
    return answers


def once(cluster: Cluster, bare: BareVllm, path: str, body: dict[str, Any]) -> list[bytes]:
    answers = []
    request = {**body, "cache_salt": uuid.uuid4().hex}
    for base in (cluster.base_url, bare.base_url):
        answer = httpx.post(
            base + path,
            json=request,
            headers={"x-request-id": request["cache_salt"]},
            timeout=180,
        )
        assert answer.status_code == 200, answer.text
        answers.append(re.sub(rb'"created(_at)?":\d+', b'"created":0', answer.content))
    return answers


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/chat/completions",
            {
                "messages": TALE,
                "temperature": 0.8,
                "seed": 11,
                "max_tokens": 24,
                "logprobs": True,
                "top_logprobs": 2,
            },
        ),
        # One at a time: the last digits also change with what else is in the engine's batch.
        ("/v1/completions", {"prompt": "Once", "seed": 3, "max_tokens": 24, "logprobs": 1}),
        ("/v1/messages", {"messages": TALE, "temperature": 0, "max_tokens": 24}),
    ],
)
def test_the_answer_is_that_of_bare_vllm_byte_for_byte(
    cluster: Cluster, bare_chat: BareVllm, path: str, body: dict[str, Any], stream: bool
) -> None:
    ours, theirs = both(cluster, bare_chat, path, {"model": CHAT, **body, "stream": stream})
    assert ours == theirs
    assert ours.count(b"data: ") > 20 if stream else json.loads(ours)


@pytest.mark.parametrize("stream", [False, True])
def test_characters_of_several_bytes_arrive_whole(
    cluster: Cluster, bare_chat: BareVllm, stream: bool
) -> None:
    text = "😀 世界 naïve 🇫🇷 👩‍👩‍👧 ﷽"
    body = {
        "model": CHAT,
        "messages": QUESTION,
        "temperature": 0,
        "structured_outputs": {"choice": [text]},
        "stream": stream,
    }
    ours, theirs = both(cluster, bare_chat, "/v1/chat/completions", body)
    assert ours == theirs
    if not stream:
        assert json.loads(ours)["choices"][0]["message"]["content"] == text
        return
    events = [e for e in ours.decode().split("\n\n") if e.startswith("data: {")]
    deltas = [json.loads(e.removeprefix("data: "))["choices"][0]["delta"] for e in events]
    assert len(deltas) > 5
    assert "".join(d.get("content") or "" for d in deltas) == text
