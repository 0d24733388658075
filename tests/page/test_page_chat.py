"""The chat: it streams, stops, begins again, compares, and shows a model's text as text."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from conftest import Opened
from harness.browser import ask
from harness.scripted import GatewayProcess, reported, until
from playwright.async_api import Locator, Page, expect
from scripted_model import Model, words

# A PNG of one pixel.
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)


def answers(page: Page) -> Locator:
    """The answers that have come to their end."""
    return page.locator('.message[aria-busy="false"]')


async def test_an_answer_streams_and_its_times_are_shown(opened: Opened) -> None:
    async with Model(words("Paris is the capital.")) as model, GatewayProcess(model) as gateway:
        model.hold_after = 2
        page = await opened(gateway, "chat/m")
        await ask(page, "What is the capital of France?")
        await expect(page.get_by_text("Paris is", exact=True)).to_be_visible()
        await expect(page.get_by_text("TTFT")).to_be_visible()
        model.go_on.set()
        await expect(page.get_by_text("Paris is the capital.")).to_be_visible()
        for shown in ("tokens/s", "7 + 4 tokens"):
            await expect(answers(page).get_by_text(shown)).to_be_visible()
        (sent,) = model.chats
        assert sent == {
            "model": "m",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }


async def test_the_conversation_goes_with_the_next_question(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "chat")
        await ask(page, "Hello?")
        await expect(answers(page)).to_have_count(1)
        await ask(page, "And again?")
        await expect(answers(page)).to_have_count(2)
        assert [it["role"] for it in model.chats[1]["messages"]] == ["user", "assistant", "user"]
        assert model.chats[1]["messages"][1]["content"] == "Hello."
        await page.get_by_role("button", name="New chat").click()
        await ask(page, "Anew?")
        await expect(answers(page)).to_have_count(1)
        assert [it["role"] for it in model.chats[2]["messages"]] == ["user"]


async def test_settings_are_sent_and_those_left_empty_are_not(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "chat")
        await page.get_by_text("Settings").click()
        await page.get_by_label("System prompt").fill("Be brief.")
        for name, value in {"temperature": "0", "max_tokens": "5", "seed": "7"}.items():
            await page.get_by_label(name).fill(value)
        await ask(page, "Hello?")
        await expect(answers(page)).to_have_count(1)
        (sent,) = model.chats
        assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
        assert (sent["temperature"], sent["max_tokens"], sent["seed"]) == (0, 5, 7)
        assert "top_p" not in sent
        await page.get_by_label("Tools").fill("[{")
        await ask(page, "Hello?")
        await expect(page.get_by_text("The tools are no JSON")).to_be_visible()
        assert len(model.chats) == 1


async def test_stop_closes_the_connection_to_the_model(opened: Opened) -> None:
    async with Model(words("One two three four")) as model, GatewayProcess(model) as gateway:
        model.hold_after = 2
        page = await opened(gateway, "chat")
        await ask(page, "Count.")
        await expect(page.get_by_text("One two")).to_be_visible()
        await page.get_by_role("button", name="Stop").click()
        await expect(page.get_by_text("stopped")).to_be_visible()
        assert await until(lambda: model.left == 1)
        await expect(page.get_by_role("button", name="Stop")).to_be_hidden()
        await expect(page.get_by_role("button", name="Send")).to_be_enabled()
        model.go_on.set()
        await ask(page, "Go on.")
        await expect(page.get_by_text("One two three four")).to_be_visible()


async def test_regenerate_asks_the_same_question_again(opened: Opened) -> None:
    async with Model(words("First answer")) as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "chat")
        await ask(page, "Hello?")
        await expect(page.get_by_text("First answer")).to_be_visible()
        model.deltas = words("Second answer")
        await page.get_by_role("button", name="Regenerate").click()
        await expect(page.get_by_text("Second answer")).to_be_visible()
        await expect(page.get_by_text("First answer")).to_be_hidden()
        first, second = model.chats
        assert first == second


HOSTILE = """\
<script>document.title = "taken"</script> <img src=x onerror="document.title='taken'">

[a link](javascript:document.title='taken') and [another](data:text/html,<script>1</script>)
and ![a picture](https://example.com/x.png) and [good](https://example.com/?a=1&b=2)

```html
<script>document.title = "taken"</script>
```

| <b>head</b> |
|---|
| <svg onload="document.title='taken'"> |
"""


@pytest.mark.parametrize("where", ["content", "reasoning", "arguments", "name"])
async def test_what_a_model_writes_is_never_html(opened: Opened, where: str) -> None:
    deltas: list[dict[str, Any]] = [{where: HOSTILE}]
    if where in ("arguments", "name"):
        function = {"name": "f", "arguments": ""} | {where: HOSTILE}
        deltas = [{"tool_calls": [{"index": 0, "id": "1", "function": function}]}]
    async with Model(deltas) as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "chat")
        await ask(page, "Hello?")
        answer = answers(page)
        await expect(answer).to_contain_text('<img src=x onerror="document.title=')
        await expect(answer).to_contain_text("</script>")
        elements = await answer.locator("*").evaluate_all("all => all.map(it => it.localName)")
        assert not {"script", "img", "svg", "b", "iframe"} & set(elements)
        links = await answer.locator("a").evaluate_all("all => all.map(it => [it.href, it.rel])")
        assert {rel for _, rel in links} <= {"noopener noreferrer"}
        assert all(href.startswith("https://example.com/") for href, _ in links)
        assert len(links) == (2 if where == "content" else 0)
        assert await page.title() == "Chat · serve_app"


MARKDOWN = """\
# Title

- one
- two
  1. inner

**bold** *thin* `code`

```py
x = 1
```

| a | b |
|---|---|
| 1 | 2 |
"""


async def test_markdown_is_shown(opened: Opened) -> None:
    async with Model(words(MARKDOWN)) as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "chat")
        await ask(page, "Hello?")
        answer = answers(page)
        await expect(answer.get_by_role("heading", name="Title")).to_be_visible()
        await expect(answer.locator("ul > li")).to_have_count(2)
        await expect(answer.locator("ul ol > li")).to_have_text("inner")
        await expect(answer.locator("strong")).to_have_text("bold")
        await expect(answer.locator("em")).to_have_text("thin")
        await expect(answer.locator("pre")).to_have_text("x = 1")
        await expect(answer.get_by_role("cell")).to_have_text(["1", "2"])


async def test_reasoning_is_folded(opened: Opened) -> None:
    deltas = [{"reasoning": "Hm, "}, {"reasoning_content": "France."}, {"content": "Paris."}]
    async with Model(deltas) as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "chat")
        await ask(page, "The capital?")
        await expect(answers(page).get_by_text("Paris.")).to_be_visible()
        thought = page.get_by_text("Hm, France.")
        await expect(thought).to_be_hidden()
        await page.get_by_text("Reasoning").click()
        await expect(thought).to_be_visible()


async def test_a_tool_call_is_shown_and_its_result_is_the_next_message(opened: Opened) -> None:
    call = {"index": 0, "id": "call-1", "type": "function"}
    deltas = [
        {"tool_calls": [call | {"function": {"name": "weather", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Paris"}'}}]},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    async with Model(deltas) as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "chat")
        await page.get_by_text("Settings").click()
        await page.get_by_label("Tools").fill(json.dumps(tools))
        await ask(page, "Will it rain?")
        await expect(page.get_by_text("Calls weather")).to_be_visible()
        await expect(page.get_by_text('{"city": "Paris"}')).to_be_visible()
        await expect(page.get_by_placeholder("The result of weather")).to_be_visible()
        model.deltas = words("It will.")
        await ask(page, "rain")
        await expect(page.get_by_text("It will.")).to_be_visible()
        first, second = model.chats
        assert first["tools"] == tools
        _, called, result = second["messages"]
        assert called["tool_calls"] == [
            {
                "id": "call-1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
            }
        ]
        assert result == {"role": "tool", "tool_call_id": "call-1", "content": "rain"}


async def test_two_models_answer_side_by_side(opened: Opened) -> None:
    applications = {"m": reported(), "other": reported()}
    async with (
        Model(words("I am m.")) as one,
        Model(words("I am another.")) as other,
        GatewayProcess(one, applications=applications) as gateway,
    ):
        gateway.board.publish("other", {"o0": (other.host, other.port)})
        page = await opened(gateway, "chat/m")
        await page.get_by_label("Compare with").select_option("other")
        await ask(page, "Who are you?")
        for name, text in {"m": "I am m.", "other": "I am another."}.items():
            side = page.get_by_role("log", name=f"Conversation with {name}")
            await expect(side.get_by_text(text)).to_be_visible()
        boxes = [await page.get_by_role("log").nth(n).bounding_box() for n in (0, 1)]
        assert boxes[0] and boxes[1] and boxes[0]["y"] == boxes[1]["y"]
        assert one.chats[0]["messages"] == other.chats[0]["messages"]
        await page.get_by_role("button", name="Regenerate").nth(1).click()
        assert await until(lambda: len(other.chats) == 2)
        assert len(one.chats) == 1


async def test_an_adapter_is_a_model_to_chat_with(opened: Opened) -> None:
    adapters = [{"name": "sql", "path": "/adapters/sql"}]
    applications = {"m": reported({"adapters": adapters})}
    async with (
        Model(words("select 1")) as model,
        GatewayProcess(model, applications=applications) as gateway,
    ):
        page = await opened(gateway, "chat/sql")
        await ask(page, "Count.")
        await expect(answers(page)).to_have_count(1)
        assert [it["model"] for it in model.chats] == ["sql"]


async def test_an_address_with_a_broken_name_is_no_error(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        await opened(gateway, "constructor")
        page = await opened(gateway, "chat/%")
        await ask(page, "Hello?")
        await expect(answers(page)).to_have_count(1)


async def test_a_conversation_outlives_its_model_s_absence(opened: Opened) -> None:
    """Neither does it end, nor does another model get the next question."""
    applications = {"a": reported(), "m": reported()}
    async with (
        Model(words("I am m.")) as model,
        GatewayProcess(model, applications=applications) as gateway,
    ):
        page = await opened(gateway, "chat/m")
        await ask(page, "Who are you?")
        await expect(page.get_by_text("I am m.")).to_be_visible()
        gateway.directory.hear({"a": reported()})
        await page.get_by_role("link", name="Fleet").click()
        await expect(page.get_by_role("article")).to_have_count(1)
        await page.get_by_role("link", name="Chat", exact=True).click()
        await expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value("m")
        await expect(page.get_by_text("I am m.")).to_be_visible()
        await ask(page, "Still there?")
        await expect(answers(page).get_by_role("alert")).to_contain_text("'m'")


async def test_an_image_goes_as_a_data_url(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "chat")
        file = {"name": "pixel.png", "mimeType": "image/png", "buffer": PIXEL}
        await page.get_by_label("Images").set_input_files([file])
        await expect(page.get_by_role("button", name="Remove image 1")).to_be_visible()
        await ask(page, "What is this?")
        await expect(answers(page)).to_have_count(1)
        (sent,) = model.chats
        image, text = sent["messages"][0]["content"]
        url = f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}"
        assert image == {"type": "image_url", "image_url": {"url": url}}
        assert text == {"type": "text", "text": "What is this?"}


async def test_what_the_gateway_says_is_shown_in_its_words(opened: Opened) -> None:
    broken = reported(status="DEPLOY_FAILED") | {"message": "No weights.", "deployments": {}}
    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "chat")
        await expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value("m")
        gateway.directory.hear({"m": broken})
        gateway.board.forget("m")
        await ask(page, "Hello?")
        body = {"model": "m", "messages": []}
        said = (await gateway.client.post("/v1/chat/completions", json=body)).json()
        await expect(answers(page).get_by_role("alert")).to_have_text(said["error"]["message"])


async def test_an_error_in_the_middle_of_a_stream_is_shown(opened: Opened) -> None:
    async with Model(words("One two three")) as model, GatewayProcess(model) as gateway:
        model.hold_after = 2
        page = await opened(gateway, "chat")
        await ask(page, "Count.")
        await expect(page.get_by_text("One two")).to_be_visible()
        model.exchanges[-1].die()
        await expect(answers(page).get_by_role("alert")).to_be_visible()
        await expect(page.get_by_text("One two")).to_be_visible()
        await expect(page.get_by_role("button", name="Send")).to_be_enabled()


async def test_the_code_that_is_shown_does_what_the_page_did(opened: Opened) -> None:
    """Both snippets are run as they are, and send what the page sent."""
    async with Model(words("It's Paris.")) as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "chat")
        await page.get_by_text("Settings").click()
        await page.get_by_label("temperature").fill("0.5")
        await ask(page, 'What\'s "it"?\nSay $HOME.')
        await expect(answers(page)).to_have_count(1)
        await page.get_by_text("As code").click()
        curl, python = await page.locator(".snippets code").all_inner_texts()
        assert "$API_KEY" in curl and 'os.environ["API_KEY"]' in python
        environment = os.environ | {"API_KEY": "-"}
        for command in (["bash", "-c", curl], [sys.executable, "-c", python]):
            ran = await _run(command, environment)
            assert "Paris." in ran, ran
        page_sent, curl_sent, sdk_sent = model.chats
        assert curl_sent == page_sent
        assert sdk_sent == {k: v for k, v in page_sent.items() if k != "stream_options"}


async def _run(command: list[str], environment: dict[str, str]) -> str:
    ran = await asyncio.to_thread(
        subprocess.run, command, env=environment, capture_output=True, text=True, check=True
    )
    return ran.stdout


async def test_a_tool_s_result_outlives_an_answer_that_failed(opened: Opened) -> None:
    function = {"name": "weather", "arguments": "{}"}
    call = {"index": 0, "id": "call-1", "type": "function", "function": function}
    async with Model([{"tool_calls": [call]}]) as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "chat")
        await ask(page, "Will it rain?")
        await expect(page.get_by_placeholder("The result of weather")).to_be_visible()
        await page.route("**/chat/completions", lambda route: route.abort())
        await ask(page, "rain")
        await expect(answers(page).get_by_role("alert")).to_be_visible()
        await page.unroute("**/chat/completions")
        model.deltas = words("It will.")
        await ask(page, "And?")
        await expect(page.get_by_text("It will.")).to_be_visible()
        sent = model.chats[-1]["messages"]
        assert [it["role"] for it in sent] == ["user", "assistant", "tool", "user"]
        assert sent[2]["content"] == "rain"


async def test_half_a_tool_call_is_not_sent_back(opened: Opened) -> None:
    function = {"name": "weather", "arguments": '{"ci'}
    call = {"index": 0, "id": "call-1", "type": "function", "function": function}
    deltas: list[Any] = [{"content": "Hm."}, {"tool_calls": [call]}, {"content": ""}]
    async with Model(deltas) as model, GatewayProcess(model) as gateway:
        model.hold_after = 2
        page = await opened(gateway, "chat")
        await ask(page, "Will it rain?")
        await expect(page.get_by_text("Calls weather")).to_be_visible()
        await page.get_by_role("button", name="Stop").click()
        await expect(page.get_by_placeholder("Message", exact=True)).to_be_visible()
        await expect(answers(page)).to_have_count(1)
        model.hold_after = None
        await ask(page, "And?")
        await expect(answers(page)).to_have_count(2)
        assert model.chats[-1]["messages"][1] == {"role": "assistant", "content": "Hm."}


async def test_a_model_that_failed_is_named_last_and_as_one(opened: Opened) -> None:
    broken = reported(status="DEPLOY_FAILED") | {"message": "No weights.", "deployments": {}}
    applications = {"broken": broken, "m": reported()}
    async with Model() as model, GatewayProcess(model, applications=applications) as gateway:
        page = await opened(gateway, "chat")
        select = page.get_by_role("combobox", name="Model", exact=True)
        await expect(select).to_have_value("m")
        await expect(select.locator("option")).to_have_text(["m", "broken (failed to start)"])


async def test_a_conversation_outlives_a_reload(opened: Opened) -> None:
    async with Model(words("A pixel.")) as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "chat")
        await page.get_by_text("Settings").click()
        await page.get_by_label("System prompt").fill("Be brief.")
        large = {"name": "l.png", "mimeType": "image/png", "buffer": b"x" * 300_000}
        small = {"name": "s.png", "mimeType": "image/png", "buffer": PIXEL}
        await page.get_by_label("Images").set_input_files([large, small])
        await expect(page.get_by_role("button", name="Remove image 2")).to_be_visible()
        await ask(page, "What is this?")
        await expect(answers(page)).to_have_count(1)
        times = await page.locator(".meta span").inner_text()
        await page.reload()
        await expect(page.get_by_text("A pixel.")).to_be_visible()
        assert await page.locator(".meta span").inner_text() == times
        await ask(page, "And now?")
        await expect(answers(page)).to_have_count(2)
        first, second = (it["messages"] for it in model.chats)
        assert second[0] == first[0] == {"role": "system", "content": "Be brief."}
        lost, image, text = second[1]["content"]
        assert [image, text] == first[1]["content"][1:]
        assert lost == {"type": "text", "text": "(An image that was not kept.)"}
        assert second[2:] == [
            {"role": "assistant", "content": "A pixel."},
            {"role": "user", "content": "And now?"},
        ]


async def test_a_reload_in_mid_stream_keeps_what_had_come(opened: Opened) -> None:
    async with Model(words("One two three")) as model, GatewayProcess(model) as gateway:
        model.hold_after = 2
        page = await opened(gateway, "chat")
        await ask(page, "Count.")
        await expect(page.get_by_text("One two")).to_be_visible()
        await page.reload()
        await expect(answers(page).get_by_text("One two")).to_be_visible()
        await expect(answers(page).get_by_text("stopped")).to_be_visible()
        assert await until(lambda: model.left == 1)


async def test_who_forgets_the_key_leaves_no_conversation(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "chat")
        await ask(page, "A secret")
        await expect(answers(page)).to_have_count(1)
        await page.reload()
        await expect(answers(page)).to_have_count(1)
        await page.get_by_role("button", name="Key").click()
        await page.get_by_role("button", name="Forget the key").click()
        await expect(answers(page)).to_have_count(0)
        await page.reload()
        await expect(page.get_by_role("button", name="Send")).to_be_enabled()
        assert "A secret" not in await page.evaluate("JSON.stringify(sessionStorage)")
