"""Embeddings, rerank and tokenize."""

from __future__ import annotations

from conftest import Opened
from harness.scripted import GatewayProcess, reported
from playwright.async_api import expect
from scripted_model import Model


async def test_the_similarity_of_texts_is_a_picture(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "try")
        part = page.get_by_role("region", name="Embeddings")
        await part.get_by_label("Texts").fill("a cat\na kitten\na market")
        await part.get_by_role("button", name="Try").click()
        picture = part.get_by_role("img", name="Cosine similarity of 3 texts")
        await expect(picture.locator("text")).to_have_count(9)
        shown = await picture.locator("text").all_text_contents()
        assert shown[:3] == ["1.00", "0.99", "0.00"]
        assert shown[0::4] == ["1.00"] * 3
        title = picture.locator("title").nth(1)
        await expect(title).to_have_text("a cat / a kitten: 0.994")


async def test_documents_are_ranked(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "try")
        part = page.get_by_role("region", name="Rerank")
        await part.get_by_label("The question").fill("Who?\nI\nYou")
        await part.get_by_role("button", name="Try").click()
        await expect(part.get_by_role("cell")).to_have_text(["0.500", "I", "0.333", "You"])


async def test_tokens_are_told_apart(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "try")
        part = page.get_by_role("region", name="Tokenize")
        await part.get_by_label("Text").fill("one <b>two</b> three")
        await part.get_by_role("button", name="Try").click()
        tokens = part.locator(".tokens span")
        await expect(tokens).to_have_text(["one", " <b>two</b>", " three"])
        colours = await tokens.evaluate_all(
            "all => all.map(it => getComputedStyle(it).backgroundColor)"
        )
        assert len(set(colours)) == 3
        await expect(part.get_by_text("3 tokens of at most 8,192.")).to_be_visible()


async def test_an_error_is_in_the_server_s_words(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        page = await opened(gateway, "try")
        part = page.get_by_role("region", name="Tokenize")
        await expect(part.get_by_label("Model")).to_have_value("m")
        gateway.directory.hear({})
        await part.get_by_role("button", name="Try").click()
        await expect(part.get_by_role("alert")).to_contain_text("'m'")


async def test_without_a_model_each_part_says_so(opened: Opened) -> None:
    async with Model() as model, GatewayProcess(model) as gateway:
        gateway.directory.hear({})
        page = await opened(gateway, "try")
        part = page.get_by_role("region", name="Tokenize")
        await expect(part.get_by_text("There is no model here yet")).to_be_visible()


async def test_a_model_that_nobody_chose_is_left_when_another_takes_it(opened: Opened) -> None:
    """Of a model that still starts nothing is known; the page shall not insist on it."""
    applications = {"m": reported(), "embedder": reported()}
    async with Model() as model, GatewayProcess(model, applications=applications) as gateway:
        page = await opened(gateway, "try")
        select = page.get_by_role("region", name="Embeddings").get_by_label("Model")
        await expect(select).to_have_value("m")
        gateway.board.about = {"m": {"takes": ["chat"]}, "embedder": {"takes": ["embeddings"]}}
        await page.get_by_role("link", name="Fleet").click()
        await page.get_by_role("link", name="Try").click()
        await expect(select).to_have_value("embedder")
