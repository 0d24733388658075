"""``GET /metrics``: the gateways' own series, and those of vLLM of every replica, as one page.

The page is in Prometheus' text format (version 0.0.4). Behind one endpoint may be several gateways,
and a scrape reaches any of them. So each tells of all, and a label tells them apart.
"""

from __future__ import annotations

import asyncio
import gzip
import logging
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from serve_app.cluster.credential import CREDENTIAL_HEADER
from serve_app.gateway.callers import Caller
from serve_app.gateway.errors import GatewayError
from serve_app.gateway.exchange import GATEWAY
from serve_app.gateway.metrics import Metrics
from serve_app.gateway.replicas import Board, FrontEnd
from serve_app.gateway.upstream import Pool, UpstreamError

logger = logging.getLogger("ray.serve")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

PATIENCE_S = 5.0
"""Seconds that replicas and gateways may take. Prometheus waits 10 by default."""

OWN = "own_metrics"
"""The method by which a gateway's process tells others what :meth:`Exposition.own` returns."""

_OF_VLLM = "vllm:"


class Page:
    """A page that was made."""

    def __init__(self, plain: bytes) -> None:
        self.plain = plain
        self.made = time.monotonic()
        self._packing: asyncio.Task[bytes] | None = None

    async def packed(self) -> bytes:
        """The page as gzip, a tenth of its size. All who ask for it share the work."""
        if self._packing is None:
            packing = asyncio.to_thread(gzip.compress, self.plain, 1)
            self._packing = asyncio.create_task(packing)
        return await asyncio.shield(self._packing)


def _serves(made: asyncio.Task[Page], max_age_s: float) -> bool:
    """Whether a page was made, and is not older than that."""
    if made.cancelled() or made.exception():
        return False
    return time.monotonic() - made.result().made < max_age_s


class Gateways(Protocol):
    """All gateways; see :class:`serve_app.cluster.gateways.Gateways`."""

    own: str

    async def ask(self, method: str, timeout_s: float) -> tuple[list[Any], bool]: ...


class Alone:
    """One gateway that knows of no other."""

    own = GATEWAY

    async def ask(self, method: str, timeout_s: float) -> tuple[list[Any], bool]:
        return [], True


class Exposition:
    """Makes the page."""

    def __init__(
        self, metrics: Metrics, board: Board, credential: bytes, gateways: Gateways | None = None
    ) -> None:
        """``credential`` opens the replicas' ports."""
        self.metrics = metrics
        self._board = board
        self._credential = credential
        self._gateways = gateways or Alone()
        self._making: asyncio.Task[Page] | None = None

    async def page(self, caller: Caller | None, max_age_s: float = 0.0) -> Page:
        """The page. Those who ask while one is made get that one.

        Args:
            max_age_s: the last one will do if it is not older.

        Raises:
            GatewayError: 403 for a key that is not an admin's.
        """
        if caller is not None and not caller.admin:
            raise GatewayError(
                403,
                f"The API key '{caller.name}' may not see the metrics; use one with 'admin: true'.",
                "permission_error",
                code="admin_only",
            )
        making = self._making
        if making is None or (making.done() and not _serves(making, max_age_s)):
            making = self._making = asyncio.create_task(self._make())
        return await asyncio.shield(making)

    async def own(self) -> tuple[str, str]:
        """This gateway's id, and a page of its series alone."""
        self.metrics.sample()
        page = await asyncio.to_thread(generate_latest, self.metrics.registry)
        return self._gateways.own, page.decode()

    async def _make(self) -> Page:
        pool = Pool(connect_timeout_s=PATIENCE_S, silence_timeout_s=PATIENCE_S)
        # The first front end has the statistics of all.
        engines = [(m, it) for m, it in self._board.all() if it.id == it.replica.id]
        try:
            own, (others, all_told), *replicas = await asyncio.gather(
                self.own(),
                self._gateways.ask(OWN, PATIENCE_S),
                *(self._replica(pool, front_end) for _, front_end in engines),
            )
        finally:
            pool.close()
        gateways = dict([own, *others])
        found = [
            ({"model": m, "replica": it.id}, p)
            for (m, it), p in zip(engines, replicas, strict=True)
        ]
        return Page(await asyncio.to_thread(_page, gateways, all_told, found))

    async def _replica(self, pool: Pool, front_end: FrontEnd) -> str | None:
        """A replica's page; None where it gives none."""
        headers = [(CREDENTIAL_HEADER, self._credential)]
        try:
            async with asyncio.timeout(PATIENCE_S):
                asked = pool.ask(front_end.host, front_end.port, "GET", "/metrics", headers, b"")
                with await asked as connection:
                    said = []
                    while not connection.ended:
                        said.append(await connection.read())
                    return b"".join(said).decode() if connection.status == 200 else None
        except (UpstreamError, TimeoutError, UnicodeDecodeError) as error:
            logger.debug(f"no metrics of {front_end.id}: {error!r}")
            return None


def _page(
    gateways: Mapping[str, str],
    all_told: bool,
    replicas: Iterable[tuple[dict[str, str], str | None]],
) -> bytes:
    """Gateways' pages by id; whether these are all; replicas' labels and pages."""
    families = Families()
    for id, page in gateways.items():
        families.add(page, {"gateway": id})
    registry = CollectorRegistry()
    up = Gauge(
        "serve_app_gateway_replica_scrape_up",
        "Whether vLLM's series of a replica are on this page: 0 where it did not answer in time.",
        ("model", "replica"),
        registry=registry,
    )
    for labels, found in replicas:
        up.labels(**labels).set(found is not None)
        if found is not None:
            families.add(found, labels, _OF_VLLM)
    peers = Gauge(
        "serve_app_gateway_peers_scrape_up",
        "Whether the series of all gateways are on this page: 0 where one did not answer in time.",
        registry=registry,
    )
    peers.set(all_told)
    families.add(generate_latest(registry).decode())
    return families.text().encode()


_FAMILY = re.compile(r"^(# HELP (\S+).*\n# TYPE .*\n)((?:[^#\n].*\n)*)", re.MULTILINE)
_SAMPLE = re.compile(r"^([^\s{]+)(\{?)", re.MULTILINE)


class Families:
    """Families of several pages. Each has its head once, and all its samples together.

    The samples stay text, as prometheus-client wrote them on their own page.
    """

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def add(self, page: str, labels: Mapping[str, str] | None = None, prefix: str = "") -> None:
        """Add the families of a page whose names begin so, with labels before each sample's own."""
        added = ",".join(f'{name}="{_escaped(value)}"' for name, value in (labels or {}).items())

        def labelled(sample: re.Match[str]) -> str:
            return f"{sample[1]}{{{added}{',' if sample[2] else '}'}"

        for head, name, samples in _FAMILY.findall(page):
            if name.startswith(prefix):
                text = _SAMPLE.sub(labelled, samples) if added else samples
                self._found.setdefault(name, [head]).append(text)

    def text(self) -> str:
        return "".join(text for family in self._found.values() for text in family)


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
