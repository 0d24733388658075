"""The models that there are, read from the report of Serve's controller alone.

The report (which ``serve status`` reads too) has every application's status and its deployed
config, ``args`` included, also while a model is starting or scaled to zero. So the directory
follows each deployment, change and removal without a restart of the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from serve_app.cluster import capacity, progress, serve
from serve_app.cluster.progress import Phase
from serve_app.cluster.replicas import Watcher
from serve_app.config.document import DEPLOYMENT, MODEL_IMPORT_PATH, deployed
from serve_app.config.engine_args import count
from serve_app.config.settings import ModelConfig, ids_of
from serve_app.errors import ConfigError
from serve_app.planner import shares

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("ray.serve")

REFRESH_S = 1.0
"""Seconds between two looks at the controller, or more: see :data:`PART`. A new model is listed
after about as long."""

PART = 0.05
"""Part of the time that a look may take. The report on a thousand replicas costs the controller
some 50 ms, in which it does nothing else, and every gateway asks for it."""

SELDOM_S = 10.0
"""Seconds between two looks at most, however long one took."""

_GONE = ("DELETING", "NOT_STARTED")


@dataclass(frozen=True)
class Start:
    """A replica that does not run yet, as Serve reports it."""

    replica: str
    since: float
    placed: bool
    """Whether it has a process on a node."""


@dataclass(frozen=True)
class Model:
    """A deployed model, as Serve reports it."""

    name: str
    """The application's name, which is its first id."""

    status: str
    """Serve's ApplicationStatus."""

    message: str
    """Why it does not run, or not with the settings deployed last, in one line; else empty."""

    ids: tuple[str, ...]
    adapters: tuple[str, ...]
    root: str
    created: int
    replicas: int
    """Replicas that run."""

    must_be_up: bool
    """False for a model that may be scaled to zero."""

    starts: tuple[Start, ...]
    config: ModelConfig | None
    """The last valid settings; None where there were none yet."""

    deployed: Mapping[str, Any] = field(default_factory=dict)
    """What Serve reported when ``config`` was made of it; empty where that was refused."""

    @property
    def up(self) -> bool:
        return self.status == "RUNNING" and (self.replicas > 0 or not self.must_be_up)

    @property
    def max_model_len(self) -> int | None:
        """The config's limit on a request's tokens; None where vLLM decides."""
        given = self.config.engine.get("max_model_len") if self.config else None
        try:
            length = count(given, "max_model_len")
        except ConfigError:
            return None
        return length if length and length > 0 else None

    @property
    def broken(self) -> bool:
        return self.status == "DEPLOY_FAILED"


class Directory:
    """The models by id, kept fresh by :meth:`run`."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._models: dict[str, Model] = {}
        self._by_id: dict[str, Model] = {}
        self._handles: dict[str, DeploymentHandle] = {}
        self._phases: dict[str, progress.Phase] = {}
        self._took_s = 0.0
        """How long Serve's controller took for the last report."""

    async def run(self) -> None:
        """Refresh for ever. While the controller does not answer, the last state stays."""
        while True:
            await asyncio.sleep(min(max(REFRESH_S, self._took_s / PART), SELDOM_S))
            try:
                await self.refresh()
            except Exception as error:
                logger.warning(f"cannot read the applications from Serve: {error!r}")

    async def refresh(self) -> None:
        """Look at the controller once."""
        asked = time.monotonic()
        report = await serve.report_async()
        self._took_s = time.monotonic() - asked
        if report is None:
            return
        models = {
            name: _announced(model, self._watcher.ids(name))
            for name, model in read_details(report, self._models).items()
        }
        for name in self._models.keys() - models.keys():
            logger.info(f"model '{name}' is gone")
            self._handles.pop(name, None)
            self._watcher.forget(name)
        for name, model in models.items():
            self._watcher.watch(name)
            _report(self._models.get(name), model)
        self._models = models
        self._by_id = _by_id(models)
        if self._phases or any(model.starts for model in models.values()):
            self._phases = await asyncio.to_thread(_phases, models.values(), self._phases)

    def starting(self, model: Model) -> list[dict[str, Any]]:
        """The phase of each starting replica, and the seconds since the phase began."""
        found = []
        for start in model.starts:
            phase = self._phases.get(start.replica, Phase("starting the process", start.since))
            seconds = max(0, round(time.time() - phase.since))  # two nodes' clocks may differ
            found.append({"replica": start.replica, "phase": phase.name, "seconds": seconds})
        return found

    def handle(self, name: str) -> DeploymentHandle:
        """A Serve handle, by which to wake a model that is scaled to zero and wait for it."""
        if name not in self._handles:
            self._handles[name] = serve.handle(DEPLOYMENT, name)
        return self._handles[name]

    def find(self, id: str) -> Model | None:
        """The model that answers to ``id``."""
        return self._by_id.get(id)

    def models(self) -> list[Model]:
        """All models, in the order in which Serve lists them."""
        return list(self._models.values())

    def ids(self) -> list[str]:
        """Every id that a client can send, without those of models that failed to deploy.

        A model whose update failed is in it: its old replicas serve on.
        """
        return [id for id, model in self._by_id.items() if model.replicas or not model.broken]


def _phases(models: Collection[Model], before: Mapping[str, Phase]) -> dict[str, Phase]:
    """The phases of starting replicas, by id. Blocks on the GCS: not for the event loop.

    ``before`` is the previous result. Replicas in it that no longer start are deleted in the GCS.
    """
    try:
        starts = [start for model in models for start in model.starts]
        found = progress.read([start.replica for start in starts if start.placed])
        progress.forget(before.keys() - {start.replica for start in starts})
        for model in models:
            unplaced = [start for start in model.starts if not start.placed]
            if unplaced and (reason := _waits_for(model, models)):
                found |= {start.replica: Phase(reason, start.since) for start in unplaced}
        return found
    except Exception as error:
        logger.warning(f"cannot read how far starting replicas are: {error!r}")
        return dict(before)


def _waits_for(model: Model, models: Collection[Model]) -> str | None:
    """Why the model's next replica cannot be placed now; None where it could be."""
    if model.config is None:
        return None
    place = shares.placed(model.config, capacity.types_of_gpu)
    group = model.config.resources.swap_group
    if group and not any(
        it.config
        and it.config.resources.swap_group == group
        and (it.replicas or any(start.placed for start in it.starts))
        for it in models
    ):
        place = place.alone  # the group has no GPU yet
    return capacity.waiting_for(place, capacity.nodes())


def _report(before: Model | None, now: Model) -> None:
    """Log what changed, for whoever watches a start."""
    if now.up and not (before and before.up):
        logger.info(f"model '{now.name}' is ready ({now.replicas} replicas)")
    elif now.message and (before is None or before.message != now.message):
        logger.warning(f"model '{now.name}' is {now.status}: {now.message}")


def _announced(model: Model, known: frozenset[str] | None) -> Model:
    """The model without aliases that not all of its running replicas know.

    An alias reaches the engine by a rolling update. It works once the last old replica is gone, and
    never if the update fails.
    """
    if known is None:
        return model
    anyway = {model.name, *model.adapters}  # adapters reach an engine while it runs
    return replace(model, ids=tuple(id for id in model.ids if id in anyway or id in known))


def _by_id(models: dict[str, Model]) -> dict[str, Model]:
    # A name beats an alias, and a working model beats a broken one. A deployment whose alias is
    # taken is refused, so this only decides until that refusal.
    ordered = sorted(models.values(), key=lambda m: m.broken)
    by_id: dict[str, Model] = {m.name: m for m in models.values()}
    for model in ordered:
        for id in model.ids:
            by_id.setdefault(id, model)
    return by_id


def read_details(
    report: Mapping[str, Any], before: Mapping[str, Model] | None = None
) -> dict[str, Model]:
    """The models among the applications of Serve's report.

    The report shows the config deployed last, even if it was refused. A model with invalid settings
    keeps those that it has in ``before``, because its replicas, if any, still run with them.
    Settings that are as they were are not read again.
    """
    found: dict[str, Model] = {}
    for name, application in serve.applications(report).items():
        if application.import_path != MODEL_IMPORT_PATH or application.status in _GONE:
            continue
        known = (before or {}).get(name)
        if known and known.deployed == application.config:
            settings, problem = known.config, ""
        else:
            settings, problem = _settings(name, application.config, known)
        scaling = settings.autoscaling if settings else None
        found[name] = Model(
            name=name,
            status=application.status,
            message=application.message or problem,
            ids=tuple(ids_of(name, settings)) if settings else (name,),
            adapters=tuple(a.name for a in settings.adapters) if settings else (),
            root=settings.model if settings else "",
            created=int(application.deployed_at),
            replicas=sum(r.state == "RUNNING" for r in application.replicas),
            must_be_up=scaling is None or scaling.min_replicas > 0,
            starts=tuple(
                Start(r.id, r.started, placed=bool(r.node))
                for r in application.replicas
                if r.state == "STARTING"
            ),
            config=settings,
            deployed={} if problem else application.config,
        )
    return found


def _settings(
    name: str, given: dict[str, Any], before: Model | None
) -> tuple[ModelConfig | None, str]:
    """The settings that a model's replicas run with; the error in those deployed last, or ''."""
    try:
        return deployed(name, given), ""
    except ConfigError as error:
        problem = str(error)
    if before is not None:
        return before.config, problem
    with contextlib.suppress(ConfigError):  # its user_config alone may be at fault
        return deployed(name, {"args": given.get("args")}), problem
    return None, problem
