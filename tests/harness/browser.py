"""Debian's Chromium without a screen, driven by Playwright."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright, expect

from harness.processes import REPO

_AXE = REPO / ".cache/axe"
AXE_ABSENT = "no axe-core here; npm install --prefix .cache/axe axe-core@4.14"

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_MS = 30_000  # five seconds are Playwright's own; a busy machine takes more
expect.set_options(timeout=PATIENCE_MS)

ABSENT = "no Chromium here; apt-get install --no-install-recommends chromium"


def axe() -> str | None:
    """The script of axe-core, which npm fetches once; None where it cannot."""
    file = _AXE / "node_modules/axe-core/axe.min.js"
    if not file.exists() and (npm := shutil.which("npm")):
        command = [
            npm,
            "install",
            "--prefix",
            str(_AXE),
            "--no-audit",
            "--no-fund",
            "axe-core@4.14",
        ]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, capture_output=True, timeout=120)
    return file.read_text() if file.exists() else None


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    # Root may run it without its sandbox only; what it loads here is our own.
    sandbox = os.getuid() != 0
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM, chromium_sandbox=sandbox
        )
        try:
            yield browser
        finally:
            await browser.close()


async def ask(page: Page, text: str) -> None:
    """Send a message in the page's chat, once it knows a model."""
    await page.get_by_role("textbox", name="Message", exact=True).fill(text)
    await expect(page.get_by_role("button", name="Send")).to_be_enabled()
    await page.keyboard.press("Enter")


@dataclass
class Complaints:
    """What a page's console said against it: errors, and violations of its policy."""

    said: list[str] = field(default_factory=list)

    def listen(self, page: Page) -> None:
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.said.append(str(error)))

    def _console(self, message: ConsoleMessage) -> None:
        # Chromium also writes a line for each answer that is no 2xx: those are no mistakes.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.said.append(message.text)
