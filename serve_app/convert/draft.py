"""Our config while it is made of another program's, and what of that has no place in it."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_app.config.document import GATEWAY_IMPORT_PATH, MODEL_IMPORT_PATH, parse_document
from serve_app.config.yaml_files import dump, note, plain
from serve_app.convert.source import Part

_WIDTH = 94


@dataclass(frozen=True)
class Remark:
    """A key of the source that has no counterpart here, and why or what to do."""

    file: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


@dataclass
class _Remarks:
    remarks: list[Remark] = field(default_factory=list)

    def leave_out(self, part: Part, why: str) -> None:
        """Say once why the source's key is not in our config. Its value is never shown."""
        remark = Remark(part.file, part.line, f"{part.name}: {why}")
        if all(other.what != remark.what for other in self.remarks):
            self.remarks.append(remark)


@dataclass
class Model(_Remarks):
    """One model's application.

    ``ids`` are what clients send, the first one before all; the application's name is made of it.
    ``args`` are a :class:`~serve_app.config.settings.ModelConfig`'s, whose values may be notes;
    ``more`` are further keys of the application.
    """

    ids: list[str] = field(default_factory=list)
    args: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def answer_to(self, part: Part, id: str) -> None:
        """Add an id."""
        if _BLANK.search(id):
            self.leave_out(part, f"an id has no blanks, so clients cannot send '{id}'")
        if id not in self.ids:
            self.ids.append(id)

    def engine(self, name: str, value: Any) -> None:
        """Set an engine argument, unless the source has set it."""
        self.args.setdefault("engine", {}).setdefault(name, value)

    def put(self, group: str, key: str, value: Any) -> None:
        """Set one key of ``resources``, ``autoscaling`` or ``env``."""
        self.args.setdefault(group, {})[key] = value


@dataclass
class Draft(_Remarks):
    """The whole config.

    ``others`` are applications that are taken over as they are, ``top`` the keys beside
    ``applications``, ``gateway`` the gateway's ``args``; ``advice`` are sentences for the top.
    """

    program: str = ""
    models: list[Model] = field(default_factory=list)
    others: list[Any] = field(default_factory=list)
    top: dict[str, Any] = field(default_factory=dict)
    gateway: dict[str, Any] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)

    def all_remarks(self) -> list[Remark]:
        """All remarks, in the source's order."""
        return _in_order([*self.remarks, *(r for model in self.models for r in model.remarks)])

    def to_yaml(self, path: Path) -> str:
        """Our config as text; ``path`` is the source's.

        Raises:
            ConfigError: our own loader would refuse it; the sentence names the source.
        """
        document = self._document(path)
        parse_document(plain(document), path)
        header = [f"Made from {path.name}, a config of {self.program}, by `serve-app convert`."]
        header += self.advice
        if self.remarks:
            header.append("Not taken over:")
            header += _bullets(self.remarks, path)
        return dump(document, header="\n".join(_wrapped(header)))

    def _document(self, path: Path) -> dict[str, Any]:
        names = _Names(self.models)
        applications: list[Any] = [
            _application(model, names.of(model), path) for model in self.models
        ]
        applications += self.others
        gateway: dict[str, Any] = {
            "name": names.free("gateway"),
            "route_prefix": "/",
            "import_path": GATEWAY_IMPORT_PATH,
        }
        if self.gateway:
            gateway["args"] = self.gateway
        return {**self.top, "applications": [*applications, gateway]}


def _application(model: Model, name: str, path: Path) -> Any:
    others = [id for id in dict.fromkeys(model.ids) if id != name and not _BLANK.search(id)]
    args = {"model": model.args["model"]}
    if others:
        args["served_as"] = others
    args |= {key: value for key, value in model.args.items() if key != "engine"}
    if engine := model.args.get("engine"):
        args["engine"] = engine
    application = {
        "name": name,
        "route_prefix": None,
        "import_path": MODEL_IMPORT_PATH,
        "args": args,
        **model.more,
    }
    if not model.remarks:
        return application
    why = _wrapped(["Not taken over:", *_bullets(model.remarks, path)])
    return note(application, "\n".join(why))


class _Names:
    """Names for applications: Serve takes no ``/``, no blanks, and each name once."""

    def __init__(self, models: Iterable[Model]) -> None:
        self._taken = {id for model in models for id in model.ids}

    def of(self, model: Model) -> str:
        """Its first id, or what can be a name of that."""
        self._taken -= set(model.ids)
        whole = _BLANK.sub("-", model.ids[0])
        name = self.free(whole.rsplit("/", 1)[-1], whole.replace("/", "-"))
        self._taken |= set(model.ids)
        return name

    def free(self, *wanted: str) -> str:
        """The first that no model has, numbered if need be."""
        numbered = (f"{wanted[-1]}-{n}" for n in itertools.count(2))
        tries = itertools.chain(filter(None, wanted), numbered)
        name = next(name for name in tries if name not in self._taken)
        self._taken.add(name)
        return name


_BLANK = re.compile(r"\s+")


def _in_order(remarks: Iterable[Remark]) -> list[Remark]:
    return sorted(remarks, key=lambda remark: (str(remark.file), remark.line))


def _bullets(remarks: Iterable[Remark], path: Path) -> list[str]:
    def at(remark: Remark) -> str:
        return "" if remark.file == path else f"{remark.file.name} "

    return [f"- {at(r)}line {r.line}: {r.what}" for r in _in_order(remarks)]


def _wrapped(lines: list[str]) -> list[str]:
    """Long lines broken, the rest of a bullet indented."""
    return [
        part
        for line in lines
        for part in textwrap.wrap(
            line, _WIDTH, subsequent_indent="  " if line.startswith("- ") else ""
        )
    ]
