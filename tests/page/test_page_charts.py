"""Charts: they move when the metrics do, and what they show is what the metrics say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import Opened
from fleet_of_examples import example
from harness.scripted import GatewayProcess, reported
from playwright.async_api import Page, Route, expect
from scripted_model import Model
from test_page_pace import Watched

SERIES = '{engine="0",model_name="org/m"}'


def bucket(le: str) -> str:
    return f'vllm:time_to_first_token_seconds_bucket{{engine="0",model_name="org/m",le="{le}"}}'


async def test_a_chart_moves_when_the_metrics_do(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        model.metrics = {
            f"vllm:generation_tokens_total{SERIES}": 100,
            f"vllm:kv_cache_usage_perc{SERIES}": 0.25,
            bucket("0.1"): 0,
            bucket("+Inf"): 0,
        }
        page = await opened(gateway, "charts")
        kv = page.get_by_role("img", name="KV cache in use")
        await expect(kv).to_have_accessible_name("KV cache in use: fullest replica 25 %")
        tokens = page.get_by_role("img", name="Tokens: ")
        await expect(tokens).to_have_accessible_name("Tokens: generated 0/s, prompt 0/s")
        before = await tokens.locator("path").first.get_attribute("d")
        model.metrics |= {
            f"vllm:generation_tokens_total{SERIES}": 1_000_000,
            f"vllm:kv_cache_usage_perc{SERIES}": 0.75,
            bucket("0.1"): 10,
            bucket("+Inf"): 10,
        }
        await expect(kv).to_have_accessible_name("KV cache in use: fullest replica 75 %")
        await expect(tokens).not_to_have_accessible_name("Tokens: generated 0/s, prompt 0/s")
        assert await tokens.locator("path").first.get_attribute("d") != before
        ttft = page.get_by_role("img", name="Time to first token")
        await expect(ttft).to_have_accessible_name("Time to first token: p50 50.0 ms, p95 95.0 ms")


async def test_points_outlive_a_reload(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        model.metrics = {f"vllm:kv_cache_usage_perc{SERIES}": 0.25}
        page = await opened(gateway, "charts")
        shown = page.get_by_role("img", name="KV cache in use: fullest replica 25 %")
        await expect(shown).to_be_visible()
        model.metrics = {}
        await page.goto(f"{gateway.base_url}/#fleet")
        await page.reload()
        kept = await page.evaluate("JSON.parse(sessionStorage['serve_app.charts'])")
        assert kept[-1]["scopes"]["m"]["kv"] == 0.25


async def test_the_pointer_tells_of_that_time_in_all_charts(opened: Opened) -> None:
    async with example() as it:
        page = await opened(it.gateway)
        kept = json.dumps(json.dumps(it.hour()))
        await page.add_init_script(f"sessionStorage['serve_app.charts'] = {kept}")
        await page.goto(f"{it.gateway.base_url}/#charts")
        await page.reload()
        hits = page.get_by_role("figure").filter(has_text="Prefix cache hits").locator("b")
        await page.get_by_role("img", name="Tokens: ").hover()
        middle = it.hour()[len(it.hour()) // 2]["scopes"][""]["hits"]
        await expect(hits).to_have_text(f"{round(middle * 100)} %")
        await expect(page.get_by_text("30 min ago")).to_have_count(8)
        await page.get_by_role("link", name="Charts").hover()
        await expect(page.get_by_text("30 min ago")).to_have_count(0)


async def test_one_model_can_be_looked_at(opened: Opened) -> None:
    applications = {"m": reported(), "other": reported()}
    async with (
        Model() as one,
        Model() as other,
        GatewayProcess(one, applications=applications) as gateway,
    ):
        gateway.board.publish("other", {"o0": (other.host, other.port)})
        one.metrics = {f"vllm:num_requests_running{SERIES}": 2}
        other.metrics = {f"vllm:num_requests_running{SERIES}": 5}
        page = await opened(gateway, "charts")
        running = page.get_by_role("img", name="Requests now: running")
        both = "Requests now: running 7, queued here 0, waiting in vLLM 0"
        await expect(running).to_have_accessible_name(both)
        await page.get_by_role("combobox", name="Model").select_option("other")
        await expect(running).to_have_accessible_name(both.replace("7", "5"))


async def calculated(modules: Page, expression: str) -> Any:
    """What functions of metrics.js, which is ``m`` in the expression, give."""
    return await modules.evaluate(f"import('./-/page/metrics.js').then((m) => {expression})")


async def test_quantiles_are_prometheus_s(modules: Page) -> None:
    cases: list[tuple[float, dict[str, int], float | None]] = [
        (0.5, {"1": 10, "2": 10, "+Inf": 10}, 0.5),
        (0.95, {"1": 0, "2": 100, "+Inf": 100}, 1.95),
        (0.5, {"1": 5, "2": 10, "+Inf": 10}, 1.0),
        (0.9, {"1": 5, "2": 5, "+Inf": 10}, 2.0),
        (0.5, {"1": 0, "+Inf": 0}, None),
        (0.5, {}, None),
    ]
    given = [
        [q, [{"labels": {"le": le}, "value": value} for le, value in buckets.items()]]
        for q, buckets, _ in cases
    ]
    found = await calculated(modules, f"{json.dumps(given)}.map((it) => m.quantile(...it))")
    assert found == [None if it is None else pytest.approx(it) for _, _, it in cases]


async def test_labels_are_read_as_prometheus_writes_them(modules: Page) -> None:
    page = 'a{x="1"} 5\n# TYPE b gauge\nb 1\na{x="\\"} 2\\n",y=""} 7\na 1e3\na NaN 17\n'
    found = await calculated(modules, f"m.parse({json.dumps(page)}, new Set(['a']))")
    assert [it["labels"] for it in found] == [{"x": "1"}, {"x": '"} 2\n', "y": ""}, {}, {}]
    assert [it["value"] for it in found[:3]] == [5, 7, 1000]


async def test_a_counter_that_begins_again_counts_from_nothing(modules: Page) -> None:
    before = 'a{replica="r"} 5\n'
    after = 'a{replica="r"} 2\na{replica="r",new=""} 3\na{replica="unheard"} 9\n'
    pages = [json.dumps(it) for it in (before, after)]
    parsed = ", ".join(f"m.parse({page}, new Set(['a']))" for page in pages)
    found = await calculated(modules, f"m.increases({parsed}).map((it) => it.value)")
    assert found == [2, 3, 0]


def of_hundred(generated: int) -> str:
    """A page of metrics of a hundred models; each has made more tokens than the one before."""
    lines = []
    for n in range(100):
        of = f'model="m{n}",replica="r{n}"'
        lines.append(f"vllm:generation_tokens_total{{{of}}} {generated * n}")
        for name in ("time_to_first_token", "inter_token_latency", "request_time_per_output_token"):
            lines += [
                f'vllm:{name}_seconds_bucket{{{of},le="{le}"}} {generated if le > n / 50 else 0}'
                for le in (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, float("inf"))
            ]
    return "\n".join(lines).replace('"inf"', '"+Inf"')


async def test_a_hundred_models_are_told_apart(opened: Opened, modules: Page) -> None:
    pages = [of_hundred(10), of_hundred(40)]
    found = await calculated(
        modules,
        f"m.points(...{json.dumps(pages)}.map((it) => m.parse(it, m.WANTED)), 30)",
    )
    assert len(found) == 101
    assert [found[f"m{n}"]["generated"] for n in (0, 7, 99)] == [0, 7, 99]
    assert found[""]["generated"] == sum(range(100))
    assert found["m7"]["tpot50"] == pytest.approx(0.175)
    assert found["m60"]["ttft50"] == pytest.approx(1.5)

    async def answer(route: Route) -> None:
        tokens.append(len(tokens) * 300)
        await route.fulfill(body=of_hundred(tokens[-1]))

    tokens: list[int] = []
    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway)
        await page.route("**/metrics", answer)
        await page.get_by_role("link", name="Charts").click()
        chosen = page.get_by_role("combobox", name="Model")
        await expect(chosen.locator("option")).to_have_count(101)
        await chosen.select_option("m0")
        none = page.get_by_role("img", name="Tokens: generated 0/s")
        await expect(none).to_be_visible()
        await chosen.select_option("m99")
        await expect(page.get_by_role("img", name="Tokens: generated ")).to_be_visible()
        await expect(none).to_have_count(0)


async def test_charts_that_nobody_looks_at_ask_seldom(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        watched = Watched(await opened(gateway, "charts"), route="**/metrics")
        await watched.begin()
        assert await watched.asked_within(20) >= 3
        await watched.page.get_by_role("link", name="Fleet").click()
        assert 1 <= await watched.asked_within(70) <= 3


async def test_points_of_many_models_are_kept_as_those_of_all(opened: Opened) -> None:
    """A tab keeps five million characters; what is longer is refused, as here each with a model."""
    async with Model() as model, GatewayProcess(model) as gateway:
        model.metrics = {f"vllm:kv_cache_usage_perc{SERIES}": 0.25}
        page = await opened(gateway, "charts")
        shown = page.get_by_role("img", name="KV cache in use: fullest replica 25 %")
        await expect(shown).to_be_visible()
        await page.evaluate(
            """() => {
              const set = Storage.prototype.setItem;
              Storage.prototype.setItem = function (name, text) {
                if (text.includes('"m":')) throw new DOMException('full', 'QuotaExceededError');
                set.call(this, name, text);
              };
            }"""
        )
        await page.reload()
        kept = await page.evaluate("JSON.parse(sessionStorage['serve_app.charts'])")
        assert kept and {*kept[-1]["scopes"]} == {""}
        assert kept[-1]["scopes"][""]["kv"] == 0.25
