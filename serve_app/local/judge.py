"""What is asked before anything starts or changes: can this config work here?

``serve-app run``, ``run --watch`` and ``reload`` ask it; ``serve-app check`` asks the same of the
config, and of this machine by :func:`limits`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

from serve_app.config.document import Fleet
from serve_app.errors import UserError
from serve_app.local import gateway_needs, this_machine, weights
from serve_app.planner import check_model
from serve_app.planner.check_machine import Limits


def refuse(
    fleet: Fleet,
    *,
    here: bool,
    replaces: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Refuse a config that cannot work.

    Args:
        here: whether this machine alone is to run it; another one may have other files and GPUs.
        replaces: whether it takes the place of what runs here already, which then makes room.
        environment: that of the server.

    Raises:
        ConfigError: the first reason, and what to change.
    """
    fleet.require_gateway()
    check_model.refuse(fleet, limits(fleet, all_memory=replaces) if here else None)
    if here:
        gateway_needs.refuse(fleet, environment)
        weights.refuse_missing(fleet)


def limits(fleet: Fleet, *, all_memory: bool) -> Limits:
    """What this machine has for ``fleet``, as a Ray that is started here would count it."""
    gpus = None
    if any(model.resources.device == "gpu" for model in fleet.models.values()):
        with contextlib.suppress(UserError):  # Ray asks the driver in another way
            gpus = this_machine.gpus()
        if not gpus and this_machine.may_have_others():
            gpus = None
    free = None if all_memory else this_machine.free_memory_bytes()
    # Unlike Ray, Python counts the cores that this process may use.
    return Limits(gpus, os.cpu_count() or 1, this_machine.memory_bytes(), free)
