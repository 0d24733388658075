"""A real Prometheus of the test's own (Debian's package ``prometheus``), and its promtool."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any, Self

import httpx
import yaml

from harness.processes import eventually, free_port
from serve_app import lifeline

PROMTOOL = shutil.which("promtool")
PROMETHEUS = shutil.which("prometheus")
ABSENT = "no Prometheus here; apt-get install --no-install-recommends prometheus"


def complaints(page: str) -> list[str]:
    """What ``promtool check metrics`` says of a page: of its form, else of its style."""
    checked = subprocess.run(
        [str(PROMTOOL), "check", "metrics"], input=page, capture_output=True, text=True
    )
    return (checked.stdout + checked.stderr).splitlines()


class Prometheus:
    """Scrapes by one job of ``scrape_configs``, every second."""

    def __init__(self, job: dict[str, Any], folder: Path) -> None:
        file = folder / "prometheus.yml"
        config = {"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}
        file.write_text(yaml.safe_dump(config))
        self._port = free_port()
        self._log = folder / "prometheus.log"
        self._command = [
            str(PROMETHEUS),
            f"--config.file={file}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self._port}",
        ]

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                preexec_fn=lifeline.interrupt_with_parent,
            )
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.wait()

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values, once there are any."""
        found: list[Any] = []

        def asked() -> bool:
            nonlocal found
            try:
                answer = httpx.get(
                    f"http://127.0.0.1:{self._port}/api/v1/query", params={"query": expression}
                )
                found = answer.json()["data"]["result"]
            except (httpx.HTTPError, KeyError, ValueError):
                return False
            return bool(found)

        assert eventually(asked, 60), f"{expression}: nothing\n{self._log.read_text()[-2000:]}"
        return [(it["metric"], float(it["value"][1])) for it in found]
