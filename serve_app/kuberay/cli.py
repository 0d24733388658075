"""``serve-app render | validate | deploy | diff | rollback | sync | delete``.

:func:`register` adds the commands to the program's group. :func:`show_status` and :func:`show_logs`
are what ``serve-app status`` and ``logs`` do for a RayService.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serve_app.errors import UserError

if TYPE_CHECKING:
    from serve_app.kuberay.live.api_server import APIServer
    from serve_app.kuberay.live.change import Change
    from serve_app.kuberay.live.target import Target

_PATH = click.Path(path_type=Path)
NAMESPACE = "serve-app"


class Name(click.ParamType[str]):
    """The name of a RayService: anything else would reach some other path of the API."""

    name = "name"

    def convert(self, value: str, param: object, ctx: object) -> str:
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", value):
            raise click.BadParameter(
                f"'{value}' is no name of a RayService: lower-case letters, digits and '-'"
            )
        return value


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
    for command in (render, validate, deploy, diff, rollback, sync, delete):
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
    from serve_app.config.document import load
    from serve_app.config.yaml_files import dump
    from serve_app.kuberay.render import files as rendering
    from serve_app.kuberay.render.profile import load_profile

    if cluster_wide == (config is not None):
        raise UserError("render: give a CONFIG, or --cluster-wide")
    if config is None:
        files, shown = rendering.cluster_wide(), ""
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
    from serve_app.kuberay.validate import manifests

    documents = manifests.read(paths)
    _report(documents, crd)
    click.echo(f"{len(documents)} manifests, no error")


def _report(documents: list[dict[str, Any]], crd: Path | None) -> None:
    """Print every finding; end with the first error."""
    from serve_app.kuberay.validate import schema
    from serve_app.kuberay.validate.judge import judge, refuse_errors

    findings = judge(documents, schema.load_crd(crd) if crd else None)
    for finding in findings:
        if finding.status == "warn" or len(findings) > 1:
            level = "warning" if finding.status == "warn" else "error"
            click.echo(f"{level}: {finding.about} {finding.text}", err=True)
    refuse_errors(findings)


context_option = click.option("--context", help="Context of the kubeconfig (default: its own).")
kubeconfig_option = click.option(
    "--kubeconfig", type=_PATH, help="Kubeconfig (default: $KUBECONFIG, ~/.kube/config)."
)
namespace_option = click.option(
    "-n", "--namespace", default=NAMESPACE, show_default=True, help="Namespace of the RayService."
)

_timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=3600.0,
    show_default=True,
    help="Seconds to wait.",
)


@click.command()
@click.argument("config", type=_PATH)
@_cluster_option
@_crd_option
@kubeconfig_option
@context_option
@click.option("--dry-run", is_flag=True, help="Only say what it would do.")
@click.option("--force", is_flag=True, help="Take over fields of others; go on without the GPUs.")
@click.option(
    "--prune",
    is_flag=True,
    help="Delete what CONFIG no longer renders: budgets, policies, ingress.",
)
@click.option("--wait/--no-wait", default=True, help="Watch until every model answers.")
@_timeout_option
def deploy(
    config: Path,
    profile_path: Path | None,
    crd: Path | None,
    kubeconfig: Path | None,
    context: str | None,
    dry_run: bool,
    force: bool,
    prune: bool,
    wait: bool,
    timeout: float,
) -> None:
    """Apply CONFIG to the cluster and wait until every model answers.

    Ctrl-C stops the waiting, not the deployment.
    """
    from serve_app.config.document import load
    from serve_app.kuberay.live import deploy as deploying
    from serve_app.kuberay.live import gpus, pruning
    from serve_app.kuberay.live.api_server import APIServer
    from serve_app.kuberay.live.target import Target
    from serve_app.kuberay.render import files as rendering
    from serve_app.kuberay.render.profile import load_profile
    from serve_app.kuberay.validate.secrets import refuse_placeholders

    fleet, profile = load(config), load_profile(profile_path)
    documents = rendering.documents(fleet, profile)
    _report(documents, crd)
    refuse_placeholders(documents)
    name = next(d["metadata"]["name"] for d in documents if d["kind"] == "RayService")
    with _interruptible(f"deploying {name}") as tell:
        server = APIServer.connect(kubeconfig, context)
        target = Target(server, name, profile.namespace)
        found = deploying.preview(server, documents, force=force)
        change = found.change
        click.echo(f"{name} in {profile.namespace} on {server.host}: this {found}")
        gpus.check(server, change, force=force, tell=click.echo)
        if change.kind == "ignored" and not force:
            raise UserError(
                "KubeRay would ignore the change of the cluster (upgradeStrategy None); "
                f"serve-app delete {target.address} and deploy again, or --force to apply the rest"
            )
        unwanted = pruning.check(target, documents, remove=prune, tell=click.echo)
        if dry_run:
            return
        number, applied = deploying.apply(
            server, documents, change, unwanted=unwanted, force=force, tell=tell
        )
    click.echo(f"revision {number}; back with: serve-app rollback {target.address}")
    if wait:
        _wait(target, timeout, change, applied)


@contextmanager
def _interruptible(what: str, done: str = "applied") -> Iterator[Callable[[str], None]]:
    """Say at Ctrl-C how much was done. What is told of each object goes through the function."""
    told = 0

    def tell(line: str) -> None:
        nonlocal told
        told += 1
        click.echo(line)

    try:
        yield tell
    except KeyboardInterrupt:
        so_far = (
            f"part of it is {done}; run it again for the rest" if told else f"nothing was {done}"
        )
        click.echo(f"\nstopped {what}: {so_far}")
        raise


def _timed(line: str) -> str:
    import time

    return f"{time.strftime('%H:%M:%S')} {line}"


def _wait(target: Target, timeout_s: float, change: Change, applied: dict[str, Any]) -> None:
    from serve_app.kuberay.live.deploy import settle
    from serve_app.kuberay.live.follow import follow

    def tell(line: str) -> None:
        click.echo(_timed(line))

    try:
        follow(target, applied, timeout_s=timeout_s, tell=tell)
        # The cluster that serves now may have been made of an earlier spec, after our first look.
        settle(target, change, tell)
        _ask_models(target)
    except KeyboardInterrupt:
        on = f"the deployment goes on: serve-app status {target.address}"
        click.echo(f"\nno longer watching; {on}")


def _ask_models(target: Target) -> None:
    """Send each model a request; say what answers.

    Raises:
        UserError: a model that runs but does not answer.
    """
    from serve_app.kuberay.live.api_server import Forbidden
    from serve_app.kuberay.live.follow import unanswered

    try:
        silent = unanswered(target, target.require())
    except Forbidden as forbidden:
        click.echo(f"every model is RUNNING ({forbidden}: none was asked)")
        return
    if silent:
        raise UserError("; ".join(silent))
    click.echo("ready: every model answers")


def has_kubeconfig() -> bool:
    """Whether there is a cluster to ask: a kubeconfig, or a pod's own account."""
    given = os.environ.get("KUBECONFIG") or os.environ.get("KUBERNETES_SERVICE_HOST")
    return bool(given) or Path("~/.kube/config").expanduser().is_file()


def show_status(
    name: str | None, namespace: str, kubeconfig: Path | None, context: str | None
) -> None:
    """Print applications, pods and troubles of a RayService; exit status 1 until it is ready.

    Raises:
        UserError: no such RayService, or without ``name`` not exactly one in the namespace.
    """
    from serve_app.kuberay.live import deploy as deploying
    from serve_app.kuberay.live import reasons, revisions, state
    from serve_app.kuberay.live.api_server import APIServer, Forbidden
    from serve_app.kuberay.live.target import Target

    server = APIServer.connect(kubeconfig, context)
    name = name or _only_service(server, namespace)
    target = Target(server, name, namespace)
    service = target.require()
    seen = state.of(service)
    clusters = f"cluster {seen.active or '(none yet)'}"
    click.echo(f"{name}: {clusters}{f', next {seen.pending}' if seen.pending else ''}")
    headline = [seen.headline] if seen.headline else []
    for line in [*headline, *seen.lines(), *reasons.pod_lines(target)]:
        click.echo(f"  {line}")
    for kind, (holds, reason, message) in seen.conditions.items():
        if kind == "Ready" or holds:
            click.echo(f"  {kind}: {'yes' if holds else 'no'} ({reason}) {message}".rstrip())
    with suppress(Forbidden):
        for line in deploying.behind(target, service):
            click.echo(f"  ! not in the running cluster: {line} (serve-app sync {target.address})")
    past = [str(revision["revision"]) for revision in revisions.history(target)]
    click.echo(f"  revisions: {', '.join(past) or 'none'}")
    if not seen.running:
        for line in reasons.explain(target):
            click.echo(f"  ! {line}")
        sys.exit(1)
    _ask_models(target)


def _only_service(server: APIServer, namespace: str) -> str:
    names = [str(d["metadata"]["name"]) for d in server.list("RayService", namespace)]
    if len(names) != 1:
        found = f"has {', '.join(sorted(names))}; name one" if names else "has none"
        raise UserError(
            f"nothing is served on this machine, and of RayServices the namespace {namespace} on "
            f"{server.host} {found}"
        )
    return names[0]


@click.command()
@click.argument("config", type=_PATH)
@_cluster_option
@kubeconfig_option
@context_option
def diff(
    config: Path, profile_path: Path | None, kubeconfig: Path | None, context: str | None
) -> None:
    """What `deploy` would change, and how KubeRay would go about it. Exit status 1 if anything."""
    from serve_app.config.document import load
    from serve_app.kuberay.live import deploy as deploying
    from serve_app.kuberay.live import pruning
    from serve_app.kuberay.live.api_server import APIServer
    from serve_app.kuberay.live.change import difference
    from serve_app.kuberay.live.target import Target
    from serve_app.kuberay.render import files as rendering
    from serve_app.kuberay.render.names import instance_name
    from serve_app.kuberay.render.profile import load_profile

    fleet, profile = load(config), load_profile(profile_path)
    documents = rendering.documents(fleet, profile)
    server = APIServer.connect(kubeconfig, context)
    found = deploying.preview(server, documents, force=True)
    click.echo(difference(found.live, found.future), nl=False)
    click.echo(f"this {found}")
    target = Target(server, instance_name(fleet), profile.namespace)
    pruning.check(target, documents, remove=False, tell=click.echo)
    sys.exit(0 if found.change.kind == "none" else 1)


@click.command()
@click.argument("name", type=Name())
@click.option("--to", "number", type=int, help="Revision (default: the one before the last).")
@namespace_option
@kubeconfig_option
@context_option
@click.option("--force", is_flag=True, help="Take over fields of others.")
@click.option("--wait/--no-wait", default=True, help="Watch until every model answers.")
@_timeout_option
def rollback(
    name: str,
    number: int | None,
    namespace: str,
    kubeconfig: Path | None,
    context: str | None,
    force: bool,
    wait: bool,
    timeout: float,
) -> None:
    """Apply an earlier revision of the RayService NAME again."""
    from serve_app.kuberay.live import deploy as deploying
    from serve_app.kuberay.live import gpus, revisions
    from serve_app.kuberay.live.api_server import APIServer
    from serve_app.kuberay.live.target import Target

    server = APIServer.connect(kubeconfig, context)
    target = Target(server, name, namespace)
    documents = revisions.find(target, number)
    with _interruptible(f"rolling back {name}") as tell:
        found = deploying.preview(server, documents, force=force)
        click.echo(f"{name} in {namespace} on {server.host}: this {found}")
        gpus.check(server, found.change, force=True, tell=click.echo)
        new, applied = deploying.apply(server, documents, found.change, force=force, tell=tell)
    click.echo(f"revision {new}")
    if wait:
        _wait(target, timeout, found.change, applied)


@click.command()
@click.argument("name", type=Name())
@namespace_option
@kubeconfig_option
@context_option
def sync(name: str, namespace: str, kubeconfig: Path | None, context: str | None) -> None:
    """Bring to the running cluster of NAME what KubeRay leaves in the RayService.

    For use after an apply by kubectl or a GitOps tool; deploy and rollback do it themselves.
    """
    from serve_app.kuberay.live import deploy as deploying
    from serve_app.kuberay.live.api_server import APIServer
    from serve_app.kuberay.live.target import Target

    target = Target(APIServer.connect(kubeconfig, context), name, namespace)
    change = deploying.sync(target, click.echo)
    if change.kind == "none":
        which = "cluster that starts" if change.clusters.pending else "running cluster"
        there = change.clusters.compared is not None
        is_there = (
            f"the {which} is as the RayService says" if there else "no cluster of it runs now"
        )
        click.echo(f"{name}: {is_there}")
    elif change.kind in ("new cluster", "ignored"):
        click.echo(f"{name}: the RayService {change}")


def show_logs(
    name: str,
    model: str | None,
    *,
    follow: bool,
    previous: bool,
    tail: int,
    namespace: str,
    kubeconfig: Path | None,
    context: str | None,
) -> None:
    """Print the logs of a RayService, or of one model of it; ``previous`` what Ray said before its
    container ended."""
    from serve_app.kuberay.live import podlogs
    from serve_app.kuberay.live.api_server import APIServer
    from serve_app.kuberay.live.target import Target

    target = Target(APIServer.connect(kubeconfig, context), name, namespace)
    try:
        for line in podlogs.stream(
            target, model=model, follow=follow, previous=previous, tail=tail
        ):
            click.echo(line)
    except KeyboardInterrupt:
        pass


@click.command()
@click.argument("name", type=Name())
@namespace_option
@kubeconfig_option
@context_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--wait/--no-wait", default=True, help="Wait until its pods are gone.")
@_timeout_option
def delete(
    name: str,
    namespace: str,
    kubeconfig: Path | None,
    context: str | None,
    yes: bool,
    wait: bool,
    timeout: float,
) -> None:
    """Delete the RayService NAME and all that is its own; not the weights.

    Ctrl-C stops the waiting: the pods go on going, and the rest stays until it is run again.
    """
    from serve_app.kuberay.live import deleting
    from serve_app.kuberay.live.api_server import APIServer
    from serve_app.kuberay.live.target import Target

    target = Target(APIServer.connect(kubeconfig, context), name, namespace)
    with _interruptible(f"deleting {name}", "deleted") as tell:
        fleet = deleting.find(target)
        click.echo(f"{name} in {namespace} on {target.server.host}: this deletes")
        for line in fleet.lines():
            click.echo(f"  {line}")
        click.echo("and keeps")
        for line in deleting.stays(target, fleet):
            click.echo(f"  {line}")
        if not yes and not sys.stdin.isatty():
            raise UserError(f"nobody is here to be asked; delete {name} with --yes")
        if not yes and not click.confirm(f"Delete {name}?"):
            click.echo("nothing was deleted")
            sys.exit(1)
        deleting.delete(
            target, fleet, wait=wait, timeout_s=timeout, tell=lambda line: tell(_timed(line))
        )
    click.echo(f"{name} is gone" if wait else f"{name} goes; its pods may take half an hour")
