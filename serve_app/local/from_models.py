"""``serve-app run MODEL…``: the config that is then run as any other."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve_app.config import yaml_files
from serve_app.config.document import Fleet, parse_document
from serve_app.errors import UserError
from serve_app.local import this_machine, weights
from serve_app.planner import compose

_UNSAVED = Path("the config above")
"""Stands for the file's name in errors."""


def config_for(
    models: Sequence[str],
    engine: dict[str, Any],
    *,
    port: int | None,
    save: Path | None,
    check: bool,
) -> tuple[Fleet, str]:
    """The config for ``models`` on this machine, and its YAML with the reason for each choice.

    ``engine`` are engine arguments for every model. ``save`` is where :func:`keep` will write the
    YAML. Without ``check`` the weights are not looked for.

    Raises:
        UserError: ``save`` is there already or its folder is not, weights or metadata are missing,
            or the models do not fit on this machine.
    """
    if save is not None and save.exists():
        raise UserError(
            f"{save} is there already; name another file with --save, or run it: "
            f"serve-app run {shlex.quote(str(save))}"
        )
    if save is not None and not save.absolute().parent.is_dir():
        raise UserError(
            f"{save}: there is no folder {save.absolute().parent}; make it, or correct it"
        )
    if check:
        for model in models:
            weights.refuse_absent(model, engine)
    machine = this_machine.look()
    document = compose.compose(models, engine, machine, port=port)
    header = (
        f"Made by `serve-app run {shlex.join(models)}`\n"
        f"for this machine: {compose.described(machine)}."
    )
    text = yaml_files.dump(document, header=header)
    return parse_document(yaml_files.plain(document), save or _UNSAVED), text


def keep(text: str, path: Path) -> None:
    """Write a config to a new file.

    Raises:
        UserError: the file is there already, or cannot be written.
    """
    try:
        with path.open("x") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another") from None
