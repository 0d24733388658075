"""The logs of a fleet's replicas, read from the log shipper in each pod."""

from __future__ import annotations

import json
import queue
import re
import threading
from collections.abc import Iterator
from typing import Any

from serve_app.config.document import DEPLOYMENT
from serve_app.errors import UserError, did_you_mean
from serve_app.kuberay.live import state
from serve_app.kuberay.live.target import Target

SHIPPER = "logs"
"""The container that copies Serve's log files to its own output, as lines of JSON."""


def stream(
    target: Target,
    *,
    model: str | None,
    follow: bool,
    previous: bool,
    tail: int,
) -> Iterator[str]:
    """``pod: line`` of every pod, or of the replicas of one model.

    ``previous`` reads Ray's own output before its container last ended.

    Raises:
        UserError: there is no pod, or no such model.
    """
    service = target.get()
    models = state.models_of(service) if service else {}
    if model is not None and models and model not in models:
        hint = did_you_mean(model, models) or f" (models: {', '.join(models)})"
        raise UserError(f"{target.name} has no model '{model}'{hint}")
    pods = [pod["metadata"]["name"] for pod in target.pods()]
    if not pods:
        raise UserError(f"{target.name} has no pods in namespace {target.namespace}")
    lines: queue.Queue[str | UserError | None] = queue.Queue(maxsize=1000)

    def read(pod: str) -> None:
        container = SHIPPER
        if previous:
            container = "ray-head" if "-head-" in pod or pod.endswith("-head") else "ray-worker"
        try:
            for line in target.server.logs(
                pod, target.namespace, container, follow=follow, previous=previous, tail=tail
            ):
                text = line if previous else readable(line, model)
                if text is not None:
                    lines.put(f"{pod}: {text}")
        except UserError as error:
            lines.put(error)
        finally:
            lines.put(None)

    for pod in sorted(pods):
        threading.Thread(target=read, args=(pod,), daemon=True).start()
    left, problems, shown = len(pods), [], 0
    while left:
        item = lines.get()
        if item is None:
            left -= 1
        elif isinstance(item, UserError):
            problems.append(item)
        else:
            shown += 1
            yield item
    # A starting pod has no log yet. That is no error as long as other pods have one.
    if problems and not shown:
        raise problems[0]


def readable(line: str, model: str | None) -> str | None:
    """The text in a line from the log shipper; None for a line of another model."""
    try:
        record: Any = json.loads(line)
        file, text = str(record.get("file") or ""), str(record["log"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return line if model is None else None
    if model is not None and not _is_of(model, file):
        return None
    return text


def _is_of(model: str, file: str) -> bool:
    """Whether a log file is a model's: ``replica_<application>_<deployment>_<id>.log``.

    The id has no underscore. Characters that file names cannot have become underscores.
    """
    name = re.sub(r'[^\x20-\x7E]|[<>:"/\\|?*]', "_", f"replica_{model}_{DEPLOYMENT}_")
    return re.fullmatch(f"{re.escape(name)}[^_]+", file.rpartition("/")[2]) is not None
