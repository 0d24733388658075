"""``serve-app render | validate | deploy | status | diff | rollback | logs``: thin, one module each.

:func:`register` adds the commands to the program's group.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from serve_app.errors import ConfigError, UserError

_PATH = click.Path(path_type=Path)

_cluster_option = click.option(
    "--cluster", "profile_path", type=_PATH, help="Cluster profile (YAML); defaults without."
)
_crd_option = click.option(
    "--crd",
    type=_PATH,
    envvar="SERVE_APP_RAYSERVICE_CRD",
    help="RayService CRD, to check every type: kubectl get crd rayservices.ray.io -o yaml.",
)


def register(group: click.Group) -> None:
    """Add every command of this module to ``group``."""
    for command in (render, validate, deploy, status, diff, rollback, logs):
        group.add_command(command)


@click.command()
@click.argument("config", type=_PATH, required=False)
@_cluster_option
@click.option("-o", "--output", type=_PATH, help="Folder to write; without it, all to the screen.")
@click.option("--cluster-wide", is_flag=True, help="What a cluster needs once, instead of CONFIG.")
@_crd_option
def render(
    config: Path | None,
    profile_path: Path | None,
    output: Path | None,
    cluster_wide: bool,
    crd: Path | None,
) -> None:
    """Write the Kubernetes manifests for CONFIG: RayService, network, budgets, nodes, alerts."""
    from serve_app.config import load
    from serve_app.kuberay import clusterwide
    from serve_app.kuberay import render as rendering
    from serve_app.kuberay.profile import load_profile
    from serve_app.kuberay.yamlfile import dump

    if cluster_wide == (config is not None):
        raise UserError("render: give a CONFIG, or --cluster-wide")
    if config is None:
        files, shown = clusterwide.clusterwide(), ""
    else:
        fleet, profile = load(config), load_profile(profile_path)
        files = rendering.render(fleet, profile)
        documents = rendering.documents(fleet, profile)
        # To the screen goes what `kubectl apply -f -` takes; the folder has the comments.
        shown = dump(*documents)
        _report(documents + rendering.node_documents(fleet, profile), crd)
    if output is None:
        click.echo(shown or "".join(f"# {name}\n{text}" for name, text in files.items()), nl=False)
        return
    changed = rendering.write(files, output)
    for path in changed:
        click.echo(f"{'wrote' if path.exists() else 'removed'} {path}")
    if not changed:
        click.echo(f"{output} is up to date")


@click.command()
@click.argument("paths", type=_PATH, nargs=-1, required=True)
@_crd_option
def validate(paths: tuple[Path, ...], crd: Path | None) -> None:
    """Check manifests (files or folders) without a cluster: one line for each mistake."""
    from serve_app.kuberay.validate import load_documents

    documents = load_documents(paths)
    _report(documents, crd)
    click.echo(f"{len(documents)} manifests, no error")


def _report(documents: list[dict[str, Any]], crd: Path | None) -> None:
    """Print every problem; end with the first error."""
    from serve_app.kuberay import schema
    from serve_app.kuberay.validate import refuse_errors
    from serve_app.kuberay.validate import validate as judge

    problems = judge(documents, schema.load_crd(crd) if crd else None)
    for problem in problems:
        if problem.level == "warning" or len(problems) > 1:
            click.echo(str(problem), err=True)
    refuse_errors(problems)


@click.command()
def deploy() -> None: ...
@click.command()
def status() -> None: ...
@click.command()
def diff() -> None: ...
@click.command()
def rollback() -> None: ...
@click.command()
def logs() -> None: ...
