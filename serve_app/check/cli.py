"""``serve-app check``, to be registered by :mod:`serve_app.cli`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console

from serve_app.errors import ConfigError
from serve_app.planner.finding import Finding


@click.command()
@click.argument("configs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--cluster", "ask_cluster", is_flag=True, help="Also ask Ray or Kubernetes at hand.")
@click.option(
    "--manifests", "given", type=click.Path(path_type=Path),
    help="Rendered manifests (default: kuberay/<config's name> beside configs/).",
)  # fmt: skip
@click.option("--json", "json_", is_flag=True, help="Print JSON.")
@click.pass_context
def check(
    context: click.Context,
    configs: tuple[Path, ...],
    ask_cluster: bool,
    given: Path | None,
    json_: bool,
) -> None:
    """The production checklist: each line ok, warn or fail, with what to change.

    Exit status: 0, 1 where a check fails, 2 where a config is wrong or it cannot run.
    """
    from serve_app.check import checklist, inventory
    from serve_app.check.on_cluster import on_cluster
    from serve_app.config.document import load

    console = Console()
    asked = inventory.at_hand() if ask_cluster else None
    by_config: dict[str, list[Finding]] = {}
    for path in configs:
        documents = checklist.find(path, given)
        findings = checklist.static(path, documents)
        if asked is not None:
            try:
                fleet = load(path)
            except ConfigError:
                pass  # said above
            else:
                findings += on_cluster(fleet, asked, documents)
        by_config[str(path)] = findings
    failed = {f.check for found in by_config.values() for f in found if f.status == "fail"}
    if json_:
        body = {
            "ok": not failed,
            "configs": {name: [asdict(f) for f in found] for name, found in by_config.items()},
        }
        click.echo(json.dumps(body, indent=2))
    else:
        for name, findings in by_config.items():
            _show(name, findings, console)
    context.exit(2 if failed & _WRONG else 1 if failed else 0)


_WRONG = {"config", "engine arguments"}
"""Checks of what every other command refuses with status 2 too."""


_MARKS = {"ok": "[green]ok  [/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}


def _show(name: str, findings: list[Finding], console: Console) -> None:
    console.print(f"[bold]{name}[/]")
    for finding in findings:
        console.print(
            f"  {_MARKS[finding.status]} {finding.check:<16} [dim]{finding.about}:[/] ",
            end="",
            highlight=False,
            soft_wrap=True,
        )
        console.print(finding.message, markup=False, highlight=False, soft_wrap=True)
        if finding.fix and finding.status != "ok":
            console.print(f"       {'':<16} → {finding.fix}", markup=False, highlight=False,
                          soft_wrap=True)  # fmt: skip
    counts = {status: sum(f.status == status for f in findings) for status in ("fail", "warn")}
    console.print(f"  {counts['fail']} to fix, {counts['warn']} to look at\n", highlight=False)
