"""``serve-app reload``: a changed config onto the server that runs, and what that did.

Serve itself decides which replicas it keeps. What is told is what was seen: the replicas' ids
before and after.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.config import notices
from serve_app.config.document import Fleet
from serve_app.errors import UserError
from serve_app.local import gateway_needs, judge
from serve_app.local.endpoint import Endpoint
from serve_app.local.found import Server

if TYPE_CHECKING:
    from serve_app.cluster.serve import Application

Tell = Callable[[str], None]

_POLL_S = 0.5
_UNSETTLED = ("DEPLOYING", "DELETING", "NOT_STARTED")


def reload(
    fleet: Fleet,
    server: Server,
    *,
    tell: Tell,
    wait: bool = True,
    check: bool = True,
    stopped: Callable[[], bool] = lambda: False,
) -> bool:
    """Deploy ``fleet``, follow each model until it is up, and tell what was done to it.

    Without ``check``, also what cannot work is deployed.

    Returns:
        Whether every application runs; False also where ``stopped`` ended the waiting.

    Raises:
        UserError: the config cannot work, the server does not answer, or Serve refuses the config.
    """
    ours = server.run if server.run is not None and server.run.ray_address is None else None
    environment = ours.environment() if ours else {}
    if check:
        judge.refuse(fleet, here=ours is not None, replaces=True, environment=environment)
    fleet.require_gateway()
    connection = server.reached()
    client = connection.serve()  # imports Ray, with what it has to know of this cluster
    from serve_app.cluster import serve

    details = client.get_serve_details()
    endpoint = server.endpoint(details)
    before = serve.applications(details)
    running = details.get("http_options") or {}
    said = notices.ignored_by_running_serve(fleet, running, again=_again(server, fleet))
    of_keys = gateway_needs.odd_keys(fleet, environment) if ours else ()
    for sentence in [*of_keys, *notices.notices(fleet), *said]:
        tell(f"note: {sentence}")
    wanted = {application["name"]: application for application in fleet.document["applications"]}
    changed = {
        name: name not in before or _plain(application) != _plain(before[name].config)
        for name, application in wanted.items()
    }
    gone = before.keys() - wanted.keys()
    if not any(changed.values()) and not gone:
        going_on = [name for name, application in before.items() if _is_unsettled(application)]
        if not going_on:
            tell("nothing changed")
            return True
        tell(f"nothing changed since the change before, which goes on: {', '.join(going_on)}")
        changed |= dict.fromkeys(going_on, True)
        # Which of their replicas were there before that change is not known any more.
        before |= {name: replace(before[name], replicas=()) for name in going_on}
    else:
        try:
            client.deploy_applications(fleet.document)
        except RuntimeError as error:  # Ray's client has no narrower one
            raise UserError(f"Serve refuses {fleet.path}: {error}") from None
    if not wait:
        for name in (*wanted, *gone):
            tell(f"{name}: {_intent(name, before, changed)}")
        return True
    try:
        return _follow(client, endpoint, before, changed, tell, stopped)
    except KeyboardInterrupt:
        tell("the change goes on; serve-app status shows it")
        raise


def _again(server: Server, fleet: Fleet) -> str | None:
    """How options that a running Serve keeps come to count; None for a Serve of another's."""
    command = f"`serve-app run {shlex.quote(str(fleet.path))}`"
    return f"the file's take effect after `serve-app stop` and {command}" if server.run else None


def _is_unsettled(application: Application) -> bool:
    return application.status in _UNSETTLED


def _follow(
    client: Any,
    endpoint: Endpoint,
    before: Mapping[str, Application],
    changed: Mapping[str, bool],
    tell: Tell,
    stopped: Callable[[], bool],
) -> bool:
    from serve_app.cluster import serve

    told: set[str] = set()
    phases: dict[str, str] = {}
    good = True
    names = [*changed, *(name for name in before if name not in changed)]
    while not stopped():
        now = serve.applications(client.get_serve_details())
        ready = endpoint.ready() or {"models": {}}
        for name in names:
            if name in told:
                continue
            application = now.get(name)
            if application is not None and _is_unsettled(application):
                starting = (ready["models"].get(name) or {}).get("starting") or []
                phase = starting[-1]["phase"] if starting else application.status.lower()
                if changed.get(name, True) and phases.get(name) != phase:
                    phases[name] = phase
                    tell(f"{name}: {phase}")
                continue
            if application is None and name in changed:
                continue  # the controller has not begun
            told.add(name)
            said, is_good = _outcome(before.get(name), application, changed.get(name, True))
            good = good and is_good
            tell(f"{name}: {said}")
        if len(told) == len(names):
            return good
        time.sleep(_POLL_S)
    return False


def _outcome(
    before: Application | None, now: Application | None, changed: bool
) -> tuple[str, bool]:
    """What was done to an application, and whether it runs."""
    if now is None:
        return "removed", True
    if now.status != "RUNNING":
        return f"{now.status.lower().replace('_', ' ')}: {now.message}", False
    if before is None:
        return "added", True
    if not changed:
        return "kept", True
    old, new = ({r.id for r in application.replicas} for application in (before, now))
    if not old and new:
        return "started", True
    if not old or old & new:
        count = f"{len(old)} to {len(new)} replicas" if len(old) != len(new) else "same replicas"
        return f"updated in place ({count})", True
    return "replaced", True


def _intent(name: str, before: Mapping[str, Application], changed: Mapping[str, bool]) -> str:
    if name not in changed:
        return "will be removed"
    if name not in before:
        return "will be added"
    return "will change" if changed[name] else "kept"


def _plain(application: Mapping[str, Any]) -> dict[str, Any]:
    """An application's config as Serve keeps it, without what was not set; empty if unknown."""
    if not application:  # deployed by code, or going
        return {}
    from ray.serve.schema import ServeApplicationSchema

    parsed = ServeApplicationSchema.model_validate(dict(application))
    return dict(parsed.model_dump(mode="json", exclude_unset=True))


class Watch:
    """Tells when a file's content has changed, however an editor wrote it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._look()

    def changed(self) -> bool:
        """Whether it has changed since the last call, and is there."""
        now = self._look()
        if now is None or now == self._seen:
            return False
        self._seen = now
        return True

    def _look(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except OSError:  # between an editor's delete and its rename
            return None
