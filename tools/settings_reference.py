"""Writes the tables of docs/settings.md from the settings' own classes (``make settings``).

A table stands between two marks, and the text around it is written by hand.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from serve_app.config import keys, settings
from serve_app.config.notices import HTTP_OPTIONS
from serve_app.kuberay.render import profile

PAGE = Path(__file__).parents[1] / "docs/settings.md"

CLASSES: dict[str, type[BaseModel]] = {
    each.__name__: each
    for each in (
        settings.ModelConfig, settings.Resources, settings.Autoscaling, settings.Adapter,
        settings.LiveConfig, settings.GatewayConfig, settings.SwapGroup, settings.QueueConfig,
        settings.RoutingConfig,
        settings.KeySource,
        settings.UsageDb, keys.Key, keys.KeyLimits,
        profile.ClusterProfile, profile.Head, profile.GatewayPods, profile.Cache, profile.Redis,
        profile.Ingress, profile.Upgrade, profile.SecretKey,
    )
}  # fmt: skip

_HTTP_OPTIONS = {
    "host": "The address to listen on. `0.0.0.0`: every IPv4 address; `127.0.0.1`: this machine "
    "only; `::0`: IPv6 too.",
    "port": "The port of the OpenAI endpoint, 1 to 65535.",
    "root_path": "A prefix that a proxy in front has cut off the path.",
    "request_timeout_s": "Leave it out: Serve ends every answer after that many seconds, a stream "
    "without an error event. The gateway's `request_timeout_s` bounds a silent replica instead.",
    "keep_alive_timeout_s": "Seconds that an idle connection stays open.",
    "ssl_keyfile": "The TLS key's file; HTTPS, together with `ssl_certfile`.",
    "ssl_certfile": "The TLS certificate's file.",
    "ssl_keyfile_password": "The key's password, if it has one.",
    "ssl_ca_certs": "Certificates that clients' certificates are checked against.",
}
"""What each of :data:`HTTP_OPTIONS` does, which Serve says in its words."""

_UNITS = {"_s": "s", "_gib": "GiB", "_mib": "MiB", "_percent": "%", "_cpu_m": "1/1000 core"}
_BOUNDS = (
    ("exclusiveMinimum", "above {}"),
    ("minimum", "at least {}"),
    ("maximum", "at most {}"),
    ("exclusiveMaximum", "below {}"),
)
_MARK = re.compile(r"(<!-- from (\w+): make settings -->\n).*?(<!-- end -->)", re.S)


def page(text: str) -> str:
    """``text`` with each table written anew."""
    return _MARK.sub(lambda m: f"{m[1]}{table(m[2])}{m[3]}", text)


def table(name: str) -> str:
    """The table of a class in :data:`CLASSES`, or of Serve's HTTP options."""
    if name == "HTTP_OPTIONS":
        options = HTTP_OPTIONS.items()
        rows = [(f"`{key}`", _shown(value), _HTTP_OPTIONS[key]) for key, value in options]
        return _table(("key", "default", "what it does"), rows)
    described = CLASSES[name]
    schema = described.model_json_schema()
    said = docstrings(described)
    required = schema.get("required", [])
    rows = []
    for key, field in schema["properties"].items():
        if key not in own(described):
            continue
        default = described.model_fields[key].default
        shown = "**required**" if key in required else _shown(default)
        rows.append((f"`{key}`", _kind(key, field, schema), shown, said.get(key, "")))
    return _table(("setting", "type", "default", "what it does"), rows)


def own(described: type[BaseModel]) -> set[str]:
    """The fields of a class without those of its bases, which have tables of their own."""
    return described.model_fields.keys() & described.__annotations__.keys()


def docstrings(described: type[BaseModel]) -> dict[str, str]:
    """The string below each field of a class, on one line and in Markdown."""
    body = ast.parse(textwrap.dedent(inspect.getsource(described))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for field, after in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            said = " ".join(str(after.value.value).split()).replace("``", "`")
            found[field.target.id] = re.sub(r"(?<!`)\bNone\b(?!`)", "`null`", said)
    return found


def _kind(key: str, field: dict[str, Any], schema: dict[str, Any]) -> str:
    """A field's type in words, with its unit and range."""
    options = [o for o in field.get("anyOf", [field]) if o.get("type") != "null"]
    found = " or ".join(_type(option, schema) for option in options)
    unit = next((name for suffix, name in _UNITS.items() if key.endswith(suffix)), "")
    limits = [words.format(o[b]) for o in options for b, words in _BOUNDS if b in o]
    return ", ".join(filter(None, [f"{found}, {unit}" if unit else found, *limits]))


def _type(option: dict[str, Any], schema: dict[str, Any]) -> str:
    if "$ref" in option:
        name = option["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in option:
        return f"`{option['const']}`"
    if "enum" in option:
        return " or ".join(f"`{value}`" for value in option["enum"])
    if option.get("type") == "array":
        return f"list of {_type(option['items'], schema)}"
    return {
        "string": "text", "integer": "whole number", "number": "number", "object": "mapping",
        "boolean": "true or false",
    }[option["type"]]  # fmt: skip


def _shown(value: Any) -> str:
    """A default in YAML. A class with a table of its own shows its defaults there."""
    if isinstance(value, BaseModel):
        if not any(field.is_required() for field in type(value).model_fields.values()):
            return "`{}`"
        value = value.model_dump()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    dumped = yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False)
    return f"`{dumped.removesuffix('...' + chr(10)).strip()}`"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
