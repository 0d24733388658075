"""``serve-app chat | reload | stop | env | admin | keys``.

:func:`show_status` and :func:`show_logs` are what ``serve-app status`` and ``logs`` do on this
machine.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from serve_app.errors import UserError

if TYPE_CHECKING:
    from serve_app.local.chat import Server

_STOP_S = 180.0
"""Seconds that a stopping run gets: it gives running requests 30, `serve run` 60, and Ray's
processes some more."""

_SAY_S = 2.0
"""Seconds after which a stop that is still under way is said to be."""

port_option = click.option(
    "--port", type=click.IntRange(1, 65535), help="Of the serve-app run, where several run here."
)


def register(group: click.Group) -> None:
    """Add every command of this module to ``group``."""
    for command in (chat, reload, stop, env, admin, keys):
        group.add_command(command)


@click.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@port_option
@click.option("--no-check", is_flag=True, help="Deploy also what cannot work.")
@click.option("--wait/--no-wait", default=True, help="Follow it until every model is up.")
def reload(config: Path | None, port: int | None, no_check: bool, wait: bool) -> None:
    """Apply CONFIG (default: the file that it runs) to the running server.

    Says what became of each model: kept, updated in place, replaced, added, removed. Ctrl-C ends
    the waiting, not the change.
    """
    from serve_app.config.document import load
    from serve_app.local import found
    from serve_app.local.reload import reload as apply

    server = found.server(port)
    if config is not None:
        config = config.resolve()
    elif server.run is None or server.run.config is None:
        raise UserError("the server was not started with a config file; name one")
    else:
        config = server.run.config
    if server.run is not None:
        os.chdir(server.run.working_folder)  # the config's own paths are relative to it
        fleet = load(config)
        fleet = fleet.on_port(server.run.port) if server.run.port_given else fleet
    else:
        fleet = load(config)
    sys.exit(0 if apply(fleet, server, tell=click.echo, wait=wait, check=not no_check) else 1)


@click.command()
@port_option
def stop(port: int | None) -> None:
    """End the serve-app run of this machine, as Ctrl-C does, and wait until it is gone.

    Running requests get 30 s to end; a second stop ends them at once.
    """
    from serve_app.local import found

    server = found.here(port)
    if server is None:
        raise UserError("nothing runs here")
    run = server.run
    if run is None:
        raise UserError(
            "no serve-app run is here; what `serve run` or `ray start` started ends by Ctrl-C "
            "there, by `serve shutdown` or by `ray stop`"
        )
    os.kill(run.pid, signal.SIGINT)
    asked = time.monotonic()
    deadline, told = asked + _STOP_S, False
    while run.lives():
        if not told and time.monotonic() > asked + _SAY_S:
            told = True
            click.echo(f"stopping the server of port {run.port}", err=True)
        if time.monotonic() > deadline:
            raise UserError(f"it has not ended in {_STOP_S:.0f} s (pid {run.pid})")
        time.sleep(0.1)
    click.echo(f"stopped the server of port {run.port}")


@click.command()
@port_option
def env(port: int | None) -> None:
    """The variables with which Ray's own commands reach the server: eval "$(serve-app env)"."""
    from serve_app.local import found

    connection = found.server(port).reached()
    dashboard = connection.dashboard()
    variables = connection.environment() | {
        "RAY_DASHBOARD_ADDRESS": dashboard,  # serve
        "RAY_API_SERVER_ADDRESS": dashboard,  # ray job, ray list
    }
    for name, value in variables.items():
        click.echo(f"export {name}={shlex.quote(value)}")


@click.command()
@click.argument("model")
@click.argument("action", type=click.Choice(["sleep", "wake", "reset-prefix-cache"]))
@click.option("--address", help="Of the Ray cluster; the one here where it is left out.")
@port_option
def admin(model: str, action: str, address: str | None, port: int | None) -> None:
    """Run ACTION on every replica of MODEL; one line each. Exit status 1 where one refuses.

    Asleep, a replica has given its GPU memory back; its weights wait in host memory.
    """
    from serve_app.cluster.connection import Connection
    from serve_app.local import found
    from serve_app.local.admin import broadcast

    named = Connection(address, "--address") if address else None
    results = broadcast(model, action, named or found.server(port).reached())
    for replica, said in results:
        click.echo(f"{replica}: {said}")
    # As serve_app.replica.sleep answers.
    undone = any(said.startswith(("refused: ", "not ")) for _, said in results)
    sys.exit(1 if undone else 0)


@click.command()
@click.argument("model", required=False)
@click.option("--url", help="Of the server: http://host:port/v1.")
@port_option
@click.option("--system", metavar="TEXT", help="What the model is told first.")
@click.option("-m", "--message", metavar="TEXT", help="Ask this and end.")
def chat(
    model: str | None, url: str | None, port: int | None, system: str | None, message: str | None
) -> None:
    """Talk to MODEL of a running server; to its only chat model where none is named.

    Asks once where standard input is no terminal: echo hi | serve-app chat.
    """
    from serve_app.local.chat import Server, converse, once

    if url and port:
        raise click.UsageError("give --url or --port, not both")
    server = Server.at(url) if url else _server(port)
    id = server.chat_model(model)
    if message is None and sys.stdin.isatty():
        converse(server, id, system)
    else:
        once(server, id, system, sys.stdin.read().strip() if message is None else message)


@click.group()
def keys() -> None:
    """API keys: make, list and revoke them (gateway.args.keys.file names their file)."""


_file_argument = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))


@keys.command()
@click.argument("name")
@click.option("--models", metavar="IDS", help="What it may name: ids or patterns, with commas.")
@click.option(
    "--expires", metavar="DAY", help="When it ends: 2030-01-31, or 2030-01-31T18:00, UTC."
)
@click.option("--admin", is_flag=True, help="It also sees what concerns all keys.")
@click.option("--requests-per-minute", type=int, metavar="N", help="In the last 60 s.")
@click.option("--tokens-per-minute", type=int, metavar="N", help="Prompts and completions.")
@click.option("--concurrent-requests", type=int, metavar="N", help="At the same time.")
@click.option("--tokens-per-day", type=int, metavar="N", help="From 00:00 UTC on.")
@click.option(
    "--file", type=click.Path(path_type=Path, dir_okay=False), help="Put the entry into it."
)
def new(
    name: str,
    models: str | None,
    expires: str | None,
    admin: bool,
    file: Path | None,
    **limits: int | None,
) -> None:
    """Print a new key, which is shown this once, and its entry for the file."""
    from serve_app.config import keys
    from serve_app.local import keys_file

    key, hash = keys.new()
    named = tuple(id.strip() for id in (models or "").split(",") if id.strip())
    if models is not None and not named:
        raise UserError("--models names no model; leave it out for a key that may use all of them")
    entry = keys_file.entry(name, hash, named, expires, admin, limits)
    if file:
        keys_file.add(file, name, entry)
    click.echo(key)
    click.echo(f"its entry is in {file}" if file else entry.rstrip(), err=file is not None)


@keys.command("list")
@_file_argument
def list_keys(file: Path) -> None:
    """List the keys of FILE."""
    from serve_app.local import keys_file

    for key in keys_file.listed(file):
        said = [key.name, ", ".join(key.models), *(["admin"] if key.admin else [])]
        if key.expires:
            word = "expired" if keys_file.expired(key) else "expires"
            said.append(f"{word} {keys_file.moment(key.expires)}")
        if key.priority:
            said.append(f"priority {key.priority}")
        if key.weight != 1:
            said.append(f"weight {key.weight:g}")
        if words := keys_file.limits(key):
            said.append(words)
        for model, limits in key.model_limits.items():
            said.append(f"of {model}: {keys_file.limits(limits) or 'no limit'}")
        click.echo("  ".join(said))


@keys.command()
@_file_argument
@click.argument("name")
def revoke(file: Path, name: str) -> None:
    """Take the key of NAME out of FILE; running gateways refuse it within 5 s."""
    from serve_app.local import keys_file

    comments = keys_file.revoke(file, name)
    click.echo(f"revoked {name}")
    if comments:
        click.echo(f"with its comment:\n{comments.rstrip()}", err=True)


def _server(port: int | None) -> Server:
    """That of the run here; else what the usual host and port make."""
    from serve_app.local import instance, runs
    from serve_app.local.chat import Server

    found = [r for r in runs.running(instance.bases()) if port in (None, r.port)]
    if len(found) == 1:
        return Server.at(found[0].endpoint.url, found[0].key, found[0].working_folder)
    return Server.at(f"http://127.0.0.1:{port or 8000}")


def show_status(port: int | None, model: str | None = None) -> None:
    """Print what runs here, or one model of it; exit status 1 until all of that is ready."""
    from rich.console import Console

    from serve_app.local import found, status

    sys.exit(0 if status.show(found.server(port), Console(), model) else 1)


def show_logs(model: str | None, *, port: int | None, tail: int, follow: bool) -> None:
    """Print the log of the run here, or of one model; where none runs, that of the last one."""
    from serve_app.local import found, instance, logs

    server = found.here(port)
    if server is None:
        last = logs.newest(instance.bases())
        if last is None:
            raise UserError(found.NOTHING)
        click.echo(f"nothing runs here; this is what the last run left: {last}", err=True)
        lines = logs.read(last, model, tail=tail)
    elif server.run is None:
        raise UserError(
            f"the Ray at {server.reached().address} is no serve-app run; its logs are under "
            "/tmp/ray/session_latest/logs of its machines"
        )
    else:
        lines = logs.lines(server.run, model, tail=tail, follow=follow)
    with contextlib.suppress(KeyboardInterrupt):
        for line in lines:
            click.echo(line)


def serves_here(port: int | None) -> bool:
    """Whether something of ours, or another Ray, runs here or at RAY_ADDRESS."""
    from serve_app.local import found

    return found.here(port) is not None
