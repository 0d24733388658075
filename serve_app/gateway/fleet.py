"""``GET /fleet``: each model as this gateway knows it, for the page and for whoever draws one.

A page that is open asks again and again, so the answer is made once for all who may see the same.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import time
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field

from serve_app.cluster.exchange import Load
from serve_app.gateway.callers import Caller
from serve_app.gateway.directory import Directory, Model
from serve_app.gateway.keyring import Keyring
from serve_app.gateway.replicas import Board, Replica, Waiting
from serve_app.gateway.usage.record import Record
from serve_app.gateway.versions import versions

FRESH_S = 0.5
"""Seconds for which an answer is given to all who may see the same."""


class Versions(BaseModel):
    """What is installed here; of a model, its vLLM's ``version`` alone."""

    version: str | None = None
    """vLLM's, as on vLLM's own route."""

    vllm: str | None = None
    serve_app: str | None = None
    ray: str | None = None


class Starting(BaseModel):
    """A replica that does not run yet."""

    replica: str
    phase: str
    """What it is doing."""

    seconds: int
    """For how long."""


class EngineLoad(BaseModel):
    """What an engine does now."""

    running: int
    """Requests that it runs."""

    waiting: int
    """Requests that wait in it."""

    capacity: int
    """How many it can run: ``max_num_seqs``."""

    kv_cache_usage: float
    """From 0 to 1."""


class RunningReplica(BaseModel):
    """A replica that runs."""

    id: str
    front_ends: int
    """Its processes that take requests."""

    asleep: bool
    load: EngineLoad | None
    """Null while it has told none for some seconds."""

    weight: float
    """What it is asked to do beside the others, from 0 to 1: less while it is new, or answers later
    than they do; nothing for a while after errors, if another one can."""


class Memory(BaseModel):
    """What is in the memory of each GPU of a replica, in GiB."""

    gpu_gib: float
    """All of the GPU's."""

    gpus: int
    """On which the model lies."""

    parts: dict[str, float]
    """``weights``, ``kv_cache``, ``graphs`` (CUDA's) and ``other`` (activations), as vLLM measured
    them at the start."""

    gpu: str | None = None
    """The GPU's UUID, where the model has a part of one."""

    part_gib: float | None = None
    """That part."""

    others: dict[str, float] | None = None
    """What other models have of the same GPU, by name; ``others`` are those that this key may not
    see."""


class FleetModel(BaseModel):
    """A deployed model."""

    status: str
    """Serve's ApplicationStatus."""

    message: str
    """Why it is not running, or not as it was deployed; empty while all is well."""

    mend: str
    """The command that mends that, or tells more of it; empty while all is well."""

    ids: list[str]
    """The ids that a request of this key can name, without adapters."""

    adapters: list[str]
    """Ids of the adapters that this key may use."""

    fallback: list[str]
    """Ids of the models that may answer for it, the best first: those that are there and that this
    key may use."""

    asleep: bool
    """Whether all its engines sleep."""

    takes: list[str]
    """``chat``, ``completions``, ``embeddings``, ``rerank``, ``score``, ``classify``,
    ``transcriptions``; in a chat ``images``, ``audio``, ``videos``, ``tools``; and whether it tells
    its ``reasoning`` apart. Empty until a replica has run."""

    max_model_len: int | None
    memory: Memory | None
    """Null on a CPU, and where vLLM did not measure it."""

    queued: int
    """Requests that wait in this gateway for a replica of it."""

    longest_wait_s: float
    starting: list[Starting]
    replicas: list[RunningReplica]


class Fleet(BaseModel):
    """The models that a key may use, and how they are."""

    object: Literal["fleet"] = "fleet"
    version: Versions
    keys: str | None = Field(
        None, description="Why the API keys in force are not those of their file; for an admin."
    )
    usage: str | None = Field(
        None,
        description="Why `usage_db` lacks requests; for an admin, and where there are no keys.",
    )
    models: dict[str, FleetModel]


@dataclass(frozen=True)
class Snapshot:
    """The fleet as some callers may see it."""

    body: bytes
    etag: str
    until: float
    """By ``time.monotonic``."""


class Fleets:
    """Makes the answers."""

    def __init__(
        self,
        directory: Directory,
        board: Board,
        keyring: Keyring | None,
        record: Record | None,
        waiting: Callable[[str], Waiting],
    ) -> None:
        self._directory = directory
        self._board = board
        self._keyring = keyring
        self._record = record
        self._waiting = waiting
        self._made: dict[tuple[tuple[str, ...], bool], Snapshot] = {}

    def seen_by(self, caller: Caller | None) -> Snapshot:
        """The fleet as this caller may see it, at most :data:`FRESH_S` old."""
        sees = (("*",), True) if caller is None else (caller.models, caller.admin)
        now = time.monotonic()
        snapshot = self._made.get(sees)
        if snapshot is None or snapshot.until < now:
            self._made = {of: it for of, it in self._made.items() if it.until >= now}
            body = self._fleet(caller).model_dump_json(exclude_unset=True).encode()
            etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            snapshot = self._made[sees] = Snapshot(body, etag, now + FRESH_S)
        return snapshot

    def _fleet(self, caller: Caller | None) -> Fleet:
        sees_all = caller is None or caller.admin
        problem = self._keyring.problem if self._keyring and sees_all else ""
        unrecorded = self._record.problem if self._record and sees_all else ""
        replicas: dict[str, dict[Replica, int]] = {}
        for name, front_end in self._board.all():
            of = replicas.setdefault(name, {})
            of[front_end.replica] = of.get(front_end.replica, 0) + 1
        models = self._directory.models()
        gpus = _on_gpus({m.name: self._board.about.get(m.name, {}) for m in models})
        seen = {m.name for m in models if caller is None or caller.may_use(m.name, m)}
        return Fleet(
            object="fleet",
            version=Versions(**versions()),
            **({"keys": problem} if problem else {}),
            **({"usage": unrecorded} if unrecorded else {}),
            models={
                m.name: self._model(m, caller, replicas.get(m.name, {}), gpus, seen)
                for m in models
                if m.name in seen
            },
        )

    def _model(
        self,
        model: Model,
        caller: Caller | None,
        replicas: dict[Replica, int],
        gpus: OnGpus,
        seen: Container[str],
    ) -> FleetModel:
        usable = [id for id in model.ids if caller is None or caller.may_use(id, model)]
        starting = [Starting(**it) for it in self._directory.starting(model)]
        running = [_running(it, front_ends) for it, front_ends in replicas.items()]
        sleeps = asleep(replicas)
        waits = self._waiting(model.name)
        about = self._board.about.get(model.name, {})
        return FleetModel(
            status=model.status,
            message=model.message or over_plan(model.name, self._board),
            mend=_mend(model, starting, sleeps and not all(it.sleeps_for_now for it in replicas)),
            ids=[id for id in usable if id not in model.adapters],
            adapters=[id for id in usable if id in model.adapters],
            fallback=self._fallback(model, caller),
            asleep=sleeps,
            takes=about.get("takes", []),
            memory=_memory(model.name, about.get("memory"), gpus, seen),
            max_model_len=model.max_model_len or self._board.max_model_len.get(model.name),
            queued=waits.requests,
            longest_wait_s=round(waits.longest_s, 1),
            starting=starting,
            replicas=running,
        )

    def _fallback(self, model: Model, caller: Caller | None) -> list[str]:
        named = model.config.fallback if model.config else []
        there = ((id, self._directory.find(id)) for id in named)
        return [id for id, it in there if it and (caller is None or caller.may_use(id, it))]


OnGpus = dict[str, dict[str, float]]
"""By a GPU's UUID: what each model has of it, in GiB, of those that have a part of one."""


def _on_gpus(abouts: Mapping[str, Mapping[str, Any]]) -> OnGpus:
    """From what replicas tell of their models, by name."""
    gpus: OnGpus = {}
    for name, about in abouts.items():
        memory = about.get("memory") or {}
        if "gpu" in memory:
            gpus.setdefault(memory["gpu"], {})[name] = sum(memory["parts"].values())
    return gpus


def _memory(
    name: str, told: dict[str, Any] | None, gpus: OnGpus, seen: Container[str]
) -> Memory | None:
    """What is in the memory of a model's GPU, with what others have there."""
    if not told or "gpu" not in told:
        return Memory(**told) if told else None
    others: dict[str, float] = {}
    for other, size in gpus[told["gpu"]].items():
        if other != name:
            key = other if other in seen else "others"
            others[key] = round(others.get(key, 0.0) + size, 2)
    return Memory(**told, others=others)


def asleep(replicas: Collection[Replica]) -> bool:
    """Whether all engines of a model sleep, and there are some."""
    loads = [it.fresh_load for it in replicas]
    return bool(loads) and all(load and load.asleep for load in loads)


def over_plan(name: str, board: Board) -> str:
    """A sentence where an engine of the model holds more of its GPU than its part, else empty."""
    over = board.over_plan(name)
    if not over:
        return ""
    return (
        f"an engine holds {over / 2**30:.2f} GiB of its GPU beyond its part, and its neighbours "
        "may find no memory; make its part larger, or set a smaller engine.kv_cache_memory_bytes"
    )


def _running(replica: Replica, front_ends: int) -> RunningReplica:
    load = replica.fresh_load
    return RunningReplica(
        id=replica.id,
        front_ends=front_ends,
        asleep=bool(load and load.asleep),
        load=_load(load) if load else None,
        weight=round(replica.weight(time.monotonic()), 1),
    )


def _load(load: Load) -> EngineLoad:
    return EngineLoad(
        running=load.running,
        waiting=load.waiting,
        capacity=load.capacity,
        kv_cache_usage=round(load.kv_cache_usage, 3),
    )


def _mend(model: Model, starting: list[Starting], put_to_sleep: bool) -> str:
    """A command of docs/troubleshooting.md; its words in capitals are the operator's to fill in."""
    name = shlex.quote(model.name)
    if model.message:
        fleet = f"{_fleet()} " if "KUBERNETES_SERVICE_HOST" in os.environ else ""
        return f"serve-app logs {fleet}{name}"
    if put_to_sleep:
        return f"serve-app admin {name} wake"
    if any(it.phase.startswith("waiting for ") for it in starting):
        return "serve-app check CONFIG --cluster"
    return ""


def _fleet() -> str:
    """The fleet's name, for which commands ask on Kubernetes: its RayService's.

    KubeRay gives its pods the RayCluster's name, which is the RayService's and five characters;
    before KubeRay 1.4 "raycluster" stood between. Elsewhere it is the operator's to fill in.
    """
    cluster = os.environ.get("RAY_CLUSTER_NAME", "")
    found = re.fullmatch(r"(.+?)(-raycluster)?-[a-z0-9]{5}", cluster)
    return found[1] if found else "FLEET"
