"""What a gateway's settings name on its machine: the API keys, folders, variables.

The gateway looks when it starts. By then the one that served before is gone.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from serve_app import addresses
from serve_app.config import keys
from serve_app.config.document import GATEWAY_IMPORT_PATH, Fleet
from serve_app.config.settings import GatewayConfig
from serve_app.errors import ConfigError

EXAMPLES = frozenset(
    keys.digest(f"sk-example-{name}".encode()) for name in ("alice", "nightly", "ops")
)
"""The hashes of configs/keys/team.yaml, whose keys everybody can read there."""


class Problem(NamedTuple):
    """Why a gateway of this machine would not start, or let nobody in."""

    why: str
    elsewhere: bool
    """Whether another machine, or a pod with a Secret, may well have what is missing here. It never
    has what a relative path names."""

    hint: str = ""
    """Where it is found, if only the server is started in that folder."""


def refuse(fleet: Fleet, environment: Mapping[str, str]) -> None:
    """Refuse settings with which a gateway of this machine would not start, or let nobody in.

    ``environment`` is that of the server.

    Raises:
        ConfigError: the first reason, and what to change.
    """
    for problem in problems(fleet, environment):
        where = f"{fleet.path}: application '{_name(fleet)}'"
        raise ConfigError(f"{where}: {problem.why}{problem.hint}")


def problems(fleet: Fleet, environment: Mapping[str, str]) -> Iterator[Problem]:
    """Each reason for :func:`refuse`, without the file's name."""
    if (gateway := fleet.gateway) is None:
        return
    environment = {**environment, **_runtime_env(fleet)}
    if gateway.keys:
        file = gateway.keys.file
        try:
            keys.read(gateway.keys, environment)
        except ConfigError as error:
            hint = fleet.start_hint(file or "")
            yield Problem(f"keys: {error}", _may_be_elsewhere(file), hint)
    for setting in ("usage_dir", "usage_spool"):
        folder = getattr(gateway, setting)
        if folder and (why := _not_writable(Path(folder))):
            said = f"{setting}: {folder} cannot be written ({why}); name another folder"
            yield Problem(said, _may_be_elsewhere(folder))
    try:
        _usage_db(gateway, environment)
    except ConfigError as error:
        yield Problem(str(error), elsewhere=True)


def open_to_all(fleet: Fleet) -> Iterator[str]:
    """A sentence where more than this machine is let in without a key."""
    if fleet.gateway and not fleet.gateway.keys and not addresses.is_loopback(fleet.host):
        yield (
            f"whoever reaches {fleet.host} may use the models: there are no API keys "
            "(gateway.args.keys; serve-app keys new)"
        )


def odd_keys(fleet: Fleet, environment: Mapping[str, str]) -> Iterator[str]:
    """A sentence where the keys let nobody in, or everybody. Those that cannot be read are
    :func:`problems`."""
    source = fleet.gateway.keys if fleet.gateway else None
    try:
        found = keys.read(source, {**environment, **_runtime_env(fleet)}) if source else None
    except ConfigError:
        return
    if source is None or found is None:
        return
    where = source.file or source.secret_env
    if not found:
        yield f"{where} lists no API key, so nobody is let in (serve-app keys new)"
    known = [key.name for key in found if key.hash in EXAMPLES]
    if known and not addresses.is_loopback(fleet.host):
        yield (
            f"{where} has keys of serve_app's examples, which everybody knows: "
            f"{', '.join(known)}; whoever reaches {fleet.host} may use the models (serve-app keys "
            "new makes others)"
        )


def in_force(fleet: Fleet, environment: Mapping[str, str]) -> str:
    """Which keys there are, in a few words."""
    source = fleet.gateway.keys if fleet.gateway else None
    if source is None:
        return f"none: whoever reaches {fleet.host} may use every model"
    try:
        number = len(keys.read(source, {**environment, **_runtime_env(fleet)}))
    except ConfigError:
        return f"those of {source.file or source.secret_env}, which cannot be read here"
    return f"{number} in {source.file or source.secret_env}"


def _may_be_elsewhere(path: str | None) -> bool:
    return path is None or Path(path).is_absolute()


def _usage_db(gateway: GatewayConfig, environment: Mapping[str, str]) -> None:
    if gateway.usage_db is None:
        return
    url = gateway.usage_db.address(environment)
    if url.startswith("sqlite:"):
        file = Path(url.removeprefix("sqlite:///"))
        if why := _not_writable(file.parent) or (file.is_dir() and "it is a folder"):
            raise ConfigError(f"usage_db: {file} cannot be written ({why}); name another file")
    else:
        from serve_app.gateway.usage.database import require_driver  # imports SQLAlchemy

        require_driver()


def _not_writable(folder: Path) -> str:
    """Why no file can be made in a folder, which may have to be made first; empty if one can."""
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        return f"{there} is no folder"
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        return f"{there}: {error.strerror}"
    return ""


def _runtime_env(fleet: Fleet) -> dict[str, str]:
    """The variables that the gateway's application sets for itself."""
    runtime_env = _application(fleet).get("runtime_env") or {}
    return dict(runtime_env.get("env_vars") or {})


def _name(fleet: Fleet) -> str:
    return str(_application(fleet)["name"])


def _application(fleet: Fleet) -> dict[str, Any]:
    return next(
        application
        for application in fleet.document["applications"]
        if application["import_path"] == GATEWAY_IMPORT_PATH
    )
