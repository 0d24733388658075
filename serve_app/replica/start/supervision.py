"""Supervises the start of an engine: reports its phases, ends it at the time limit, explains its
failure."""

from __future__ import annotations

import gc
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve_app import lifeline
from serve_app.config.settings import ModelConfig
from serve_app.errors import UserError
from serve_app.replica.start import errors
from serve_app.replica.start.plugin import PHASE, REASON, START_FOLDER
from serve_app.replica.start.progress import Progress
from serve_app.replica.start.watch import StartWatch

logger = logging.getLogger("ray.serve")


@contextmanager
def supervised(config: ModelConfig, application: str, replica: str) -> Iterator[None]:
    """Supervise the engine that the ``with`` block starts in the replica of this id.

    Raises:
        UserError: why the block failed, in one sentence.
    """
    lifeline.tie_children()
    # vLLM's imports make many objects and hardly any garbage: the collector, which looks through
    # them again and again, would take a quarter of the imports' CPU time.
    gc.disable()
    with (
        tempfile.TemporaryDirectory(prefix="serve-app-") as folder,
        Progress(replica, Path(folder) / PHASE) as progress,
        StartWatch(application, replica, config.start_timeout_s) as watch,
    ):
        os.environ[START_FOLDER] = folder
        reason = Path(folder) / REASON
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            logger.exception("the engine did not start")
            if watch.overdue:
                raise UserError(errors.too_slow(progress.phase, config)) from None
            text = f"{type(error).__name__}: {error}"
            if reason.exists():
                text = reason.read_text()
            raise UserError(errors.explain(text, config)) from None
        finally:
            gc.enable()
