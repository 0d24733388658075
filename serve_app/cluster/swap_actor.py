"""A swap group in Ray: its coordinator and its GPU, which live as long as the group's applications.

The coordinator is an actor on the cluster's head that puts :class:`serve_app.cluster.swap.Group`
between the members' reports and their orders. The GPU is a placement group of one whole GPU, from
which each member takes a small part: so all are on the same GPU, and nobody else is.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from serve_app.cluster import serve
from serve_app.cluster.placement import type_of
from serve_app.cluster.swap import Group, Order, Report
from serve_app.config.document import GATEWAY_IMPORT_PATH, MODEL_IMPORT_PATH
from serve_app.config.settings import GatewayConfig, SwapGroup, parse
from serve_app.errors import ConfigError, UserError

logger = logging.getLogger("ray.serve")

HOLD_S = 1.0
"""Seconds after which a report is answered though there is no order."""

LOOK_S = 0.05
"""Seconds between two looks at what the passing of time alone has decided."""

TERMS_S = 2.0
"""Seconds between two looks at Serve's report, for the terms and for whether the group exists."""

LEAVE_S = 60.0
"""Seconds without an application of the group after which its GPU is given back."""

PART = 0.01
"""Of the group's GPU, what each member asks Ray for. It says nothing of memory."""

_NAME = "serve_app_swap_1_{}"
"""With a number to raise when replicas of two versions would not understand each other."""

encode = msgspec.msgpack.encode
_report = msgspec.msgpack.Decoder(Report).decode
_order = msgspec.msgpack.Decoder(Order | None).decode


class SwapActor:
    """The coordinator of one group; its process is named after it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._group = Group(uuid.uuid4().hex[:8], time.monotonic())
        self._terms = SwapGroup()
        self._held: dict[str, asyncio.Future[None]] = {}
        """The newest unanswered report of each member."""

        self._tasks: list[asyncio.Task[None]] = []

    async def exchange(self, told: bytes) -> bytes:
        """Take a report; answer with the order that the member has not heard, as soon as there is
        one, or with none after a while."""
        self.watch()
        report = _report(told)
        self._group.report(report, time.monotonic())
        if before := self._held.pop(report.member, None):
            before.cancel()
        mine = self._held[report.member] = asyncio.get_running_loop().create_future()
        self._decide()
        await asyncio.wait([mine], timeout=HOLD_S)
        if mine.cancelled():  # this member's next report is here, and gets what there is
            return encode(None)
        if self._held.get(report.member) is mine:
            del self._held[report.member]
        return encode(self._group.order(report.member))

    def watch(self) -> None:
        """Begin to look at the time and at Serve, once."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(it) for it in (self._tick(), self._look())]

    async def begin(self) -> None:
        """Called by whoever made the actor: also one without a member must end some day."""
        self.watch()

    def _decide(self) -> None:
        self._group.decide(self._terms, time.monotonic())
        for member, held in self._held.items():
            if not held.done() and self._group.order(member):
                held.set_result(None)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self._decide()

    async def _look(self) -> None:
        """Read the terms from Serve's report, and end when no application is of this group."""
        seen = time.monotonic()
        while True:
            try:
                report = await serve.report_async()
                applications = serve.applications(report or {})
            except Exception as error:  # the controller is away; the next time
                logger.warning(f"swap group '{self._name}' cannot read from Serve: {error!r}")
            else:
                self._terms = terms_of(self._name, applications, self._terms)
                now = time.monotonic()
                if not self._group.empty or _has_members(self._name, applications):
                    seen = now
                if now - seen > LEAVE_S:
                    await asyncio.to_thread(_give_back, self._name)
                    import ray

                    ray.kill(ray.get_runtime_context().current_actor)
            await asyncio.sleep(TERMS_S)


def terms_of(
    name: str, applications: Mapping[str, serve.Application], before: SwapGroup
) -> SwapGroup:
    """A group's terms, as the deployed gateway's args have them.

    They stay as they were ``before`` while there is no gateway, or its args are refused: with a
    smaller ``awake`` models would be sent to sleep for a typo.
    """
    for application in applications.values():
        if application.import_path == GATEWAY_IMPORT_PATH:
            try:
                config = parse(GatewayConfig, application.args, "args")
            except ConfigError:
                return before
            return config.swap_groups.get(name, SwapGroup())
    return before


def _has_members(name: str, applications: Mapping[str, serve.Application]) -> bool:
    return any(
        it.import_path == MODEL_IMPORT_PATH
        and isinstance(resources := it.args.get("resources"), Mapping)
        and resources.get("swap_group") == name
        for it in applications.values()
    )


# --- a member's side ------------------------------------------------------------------------------


class Coordinator:
    """A member's way to the coordinator. For a thread, since its calls block."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._actor: Any = None

    def exchange(self, report: Report, news: Callable[[], bool]) -> Order | None:
        """Report; return the order, if there is one. Ends early where there is ``news`` to report.

        Raises whatever Ray does where the actor is away.
        """
        import ray

        if self._actor is None:
            self._actor = _actor(self._name)
        asked = self._actor.exchange.remote(encode(report))
        deadline = time.monotonic() + 5 * HOLD_S
        while time.monotonic() < deadline:
            done, _ = ray.wait([asked], timeout=LOOK_S)
            if done:
                try:
                    order: Order | None = _order(ray.get(asked))
                    return order
                except Exception:
                    self._actor = None
                    raise
            if news():
                return None
        self._actor = None
        raise TimeoutError("no answer")


def reserve(name: str, bundle: Mapping[str, float]) -> str:
    """Have the group's GPU reserved, unless it is; return its id.

    ``bundle`` has Ray's names. Does not wait until there is one free.

    Raises:
        ConfigError: the group has another type of GPU.
    """
    from ray.exceptions import RaySystemError
    from ray.util import placement_group

    _actor(name).begin.remote()
    group = _found(name)
    if group is None:
        try:
            group = placement_group([dict(bundle)], name=_NAME.format(name), lifetime="detached")
        except RaySystemError:  # another member has just made it
            group = _found(name)
            if group is None:
                raise
    [there] = group.bundle_specs
    if there.keys() != bundle.keys():
        raise ConfigError(
            f"swap group '{name}' has {_named(there)}, and this model asks for {_named(bundle)}; "
            "give the group another name in all its models, or delete them first"
        )
    return str(group.id.hex())


def _named(bundle: Mapping[str, float]) -> str:
    return f"1{type_of(bundle)} GPU" if "GPU" in bundle else "no GPU"


def id_of(name: str) -> str:
    """The id of the group's GPU, which is reserved.

    Raises:
        UserError: it is not any more.
    """
    group = _found(name)
    if group is None:
        raise UserError(f"the GPU of swap group '{name}' was given back; deploy the model again")
    return str(group.id.hex())


def part(id: str, *, gpu: bool) -> dict[str, float]:
    """What a member asks Ray for, to be on the group's GPU (or on its node, where it has none)."""
    return {f"{'GPU' if gpu else 'bundle'}_group_{id}": PART}


def _found(name: str) -> Any:
    from ray.util import get_placement_group

    try:
        return get_placement_group(_NAME.format(name))
    except ValueError:
        return None


def _give_back(name: str) -> None:
    from ray.util import remove_placement_group

    if group := _found(name):
        remove_placement_group(group)


def _actor(name: str) -> Any:
    import ray

    remote: Any = ray.remote(SwapActor)
    return remote.options(
        name=_NAME.format(name),
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        num_cpus=0,
        # As the limits' actor: on another node it would keep the autoscaler from removing it.
        resources={"node:__internal_head__": 0.001},
    ).remote(name)
