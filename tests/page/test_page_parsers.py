"""What reads a model's stream and its markdown, given what nobody would write."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from playwright.async_api import Page

PIECES = [
    *("<", ">", "<img src=x onerror=document.title='taken'>", "<script>", "</script>", "<!--", "&"),
    *("&lt;", "&#60;", '"', "'", "`", "```", "~~~", "*", "**", "_", "__", "~~", "[", "]", "(", ")"),
    *("[a](javascript:alert(1))", "[a](https://example.com)", "![a](x)", "[a](", "https://a.b/(c)"),
    *("http://", "#", "##", "-", "1.", "|", "|---|---|", "\\", "é", "\u202e", "😀", "a", "b", " "),
    *("data:text/html,x", "JaVaScRiPt:1", "\n", "\n", "\n\n", "  ", "\t", "\r"),
]

ALLOWED = {
    *("p", "h3", "h4", "h5", "h6", "hr", "br", "ul", "ol", "li", "blockquote", "strong", "em"),
    *("del", "code", "pre", "a", "div", "span", "button", "table", "thead", "tbody", "tr", "th"),
    "td",
}


async def markdown(modules: Page, texts: list[str]) -> Any:
    """The elements that are made of texts, and the addresses of links."""
    return await modules.evaluate(
        """async (texts) => {
          const { markdown } = await import('./-/page/markdown.js');
          const blocks = texts.flatMap((text) => markdown(text));
          const all = blocks.flatMap((it) => [it, ...it.querySelectorAll('*')]);
          return [[...new Set(all.map((it) => it.localName))],
                  [...new Set(all.flatMap((it) => it.getAttributeNames()))],
                  all.filter((it) => it.href).map((it) => it.href)];
        }""",
        texts,
    )


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_no_text_becomes_an_element_that_is_not_markdown_s(modules: Page, seed: int) -> None:
    chosen = random.Random(seed)
    texts = ["".join(chosen.choices(PIECES, k=chosen.randint(1, 40))) for _ in range(1000)]
    elements, attributes, links = await markdown(modules, texts)
    assert set(elements) <= ALLOWED
    assert set(attributes) <= {
        *("class", "href", "rel", "target", "start", "scope", "tabindex", "type", "data-copy"),
    }
    assert links and all(it.startswith(("http://", "https://")) for it in links)


@pytest.mark.parametrize(
    "text",
    [
        *("*" * 20_000, "**a" * 8000, "[" * 20_000, "[a](" * 8000, "`a``b" * 4000, "> " * 8000),
        *("__**" * 5000 + "a", "|-" * 9000 + "\n" + "|-" * 9000 + "x", "  - a\n" * 5000),
        "\n".join("  " * depth + "- x" for depth in range(400)),
        *("**a " * 50_000, "__a " * 50_000, "a" + "`" * 200_000, "\\*" * 200_000),
        *(f"{begin}{' ' * 200_000}b" for begin in ("[a](", "# a", "a|\n")),
        "|a" * 50_000 + "\n" + "|-" * 20_000 + "\n" + "|\n" * 20_000,
    ],
    ids=lambda text: text[:8],
)
async def test_no_text_is_too_much(modules: Page, text: str) -> None:
    """It ends, within the time that a test may take, and without a stack that overflows."""
    elements, _, _ = await markdown(modules, [text])
    assert elements


STREAM = (
    ': waiting\n\ndata: {"n": 1}\n\n'
    'event: message\r\nid: 7\r\ndata: {"text":\r\ndata: "é😀"}\r\n\r\n'
    'data:{"n": 3}\n\n: waiting\r\n\r\ndata: [DONE]\n\n'
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_events_are_read_however_they_are_cut(modules: Page, size: int) -> None:
    found = await modules.evaluate(
        """async ([text, size]) => {
          const { events } = await import('./-/page/stream.js');
          const bytes = new TextEncoder().encode(text);
          const body = new ReadableStream({ start(controller) {
            for (let at = 0; at < bytes.length; at += size) {
              controller.enqueue(bytes.slice(at, at + size));
            }
            controller.close();
          } });
          const found = [];
          for await (const event of events(new Response(body))) found.push(event);
          return found;
        }""",
        [STREAM, size],
    )
    assert found == [{"n": 1}, {"text": "é😀"}, {"n": 3}]


async def test_an_error_event_is_the_server_s_sentence(modules: Page) -> None:
    said = "The replica was lost; send the request again."
    event = f"data: {json.dumps({'error': {'message': said, 'code': 'replica_lost'}})}\n\n"
    found = await modules.evaluate(
        """async (text) => {
          const { events } = await import('./-/page/stream.js');
          try {
            for await (const _ of events(new Response(text)));
          } catch (error) {
            return error.message;
          }
        }""",
        event,
    )
    assert found == said


@pytest.mark.parametrize("end", ["it.error(new TypeError('network'))", "it.close()"])
async def test_a_connection_that_breaks_off_is_told_in_a_sentence(modules: Page, end: str) -> None:
    """Some proxies make a clean end of it; then `[DONE]` is missing."""
    found = await modules.evaluate(
        f"""async () => {{
          const {{ events }} = await import('./-/page/stream.js');
          const body = new ReadableStream({{ pull: (it) => {end} }});
          try {{
            for await (const _ of events(new Response(body)));
          }} catch (error) {{
            return error.message;
          }}
        }}""",
    )
    assert found == "The connection broke off before the answer's end."
