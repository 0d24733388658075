"""``serve-app plan``, to be registered by :mod:`serve_app.cli`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from serve_app.config.document import load
from serve_app.config.settings import ModelConfig
from serve_app.errors import ConfigError, UserError
from serve_app.planner import (
    check_model,
    choose,
    ec2,
    front_ends,
    hardware,
    report,
    swap,
    together,
    totals,
    verdict,
)
from serve_app.planner.hardware import GPU
from serve_app.planner.loading import cpu_plan, load_model
from serve_app.planner.model import metadata
from serve_app.planner.model.checkpoint import Model
from serve_app.planner.report import Report
from serve_app.planner.targets import engine_arguments, is_config

_TYPICAL_LENGTH = 2048
_LONG_CONTEXT, _SHORTER = 131_072, 32_768
"""Tokens: a context of its own beyond which a shorter one is suggested, and that one."""


@click.command()
@click.argument("target", metavar="CONFIG|MODEL", required=False)
@click.option(
    "--gpu", "gpu_name", metavar="NAME", help="A GPU (H100) or an EC2 type (p5.48xlarge)."
)
@click.option("--model", "only", metavar="ID", help="One model of a config with several.")
@click.option(
    "-e", "--engine", "overrides", metavar="KEY=VALUE", multiple=True,
    help="An engine argument, over the config's.",
)  # fmt: skip
@click.option(
    "--typical-length", default=_TYPICAL_LENGTH, show_default=True, type=click.IntRange(1),
    help="Tokens of a usual request, prompt and answer together.",
)  # fmt: skip
@click.option(
    "--prices", type=click.Path(path_type=Path, dir_okay=False),
    help="YAML or JSON: instance type to USD per hour.",
)  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Save bars as SVG.")
@click.option("--json", "json_", is_flag=True, help="Print JSON.")
@click.option("--list", "list_", is_flag=True, help="List GPUs and the models known offline.")
def plan(
    target: str | None,
    gpu_name: str | None,
    only: str | None,
    overrides: tuple[str, ...],
    typical_length: int,
    prices: Path | None,
    plot: Path | None,
    json_: bool,
    list_: bool,
) -> None:
    """Say whether a model fits, on which GPUs and machines, and for how many requests at once.

    The exit status is 1 if it does not, or one of a config's models does not.
    """
    console = Console()
    if list_:
        _list(console)
        return
    if target is None:
        raise click.UsageError("name a config file or a model")
    priced = ec2.read_prices(prices) if prices else None
    targets = _targets(target, only, engine_arguments(overrides))
    fleet = load(Path(target)) if is_config(target) else None
    of_groups = swap.gpu_names(fleet) if fleet else {}
    shared_gpu = together.one_gpu({name: (it, config) for name, it, config, _ in targets})
    reports = []
    for found in targets:
        name, _, config, _ = found
        gpu = gpu_name or of_groups.get(name) or together.name_of(shared_gpu, config)
        with _told_of(target, name):
            reports.append(
                _report(*found, gpu_name=gpu, typical_length=typical_length, prices=priced)
            )
    groups, crowded = [], []
    if fleet and not only:
        instead = hardware.find(gpu_name)[0] if gpu_name else None
        groups = list(swap.problems(fleet, instead=instead))
        crowded = list(together.problems(fleet, instead=instead))
    together_fit = all(it.status != "fail" for it in (*groups, *crowded))
    fits = together_fit and all(one.plan.fits for one in reports)
    shared = together.of_fleet(reports)
    if json_:
        models = [report.as_json(one) for one in reports]
        if len(models) == 1:
            body = models[0] | {"fits": fits}
        else:
            body = {"fits": fits, "machines": totals.as_json(reports), "models": models}
            if shared:
                body["shared_gpus"] = together.as_json(shared)
        if groups:
            body["swap_groups"] = [asdict(it) for it in groups]
        if crowded:
            body["on_no_machine"] = [asdict(it) for it in crowded]
        click.echo(json.dumps(body, indent=2))
    else:
        whole = Text(totals.verdict(reports, together_fit), "bold green" if fits else "bold red")
        if len(reports) > 1:
            console.print(whole)
            console.rule()
        for index, one in enumerate(reports):
            if index:
                console.rule()
            report.show(one, console)
        together.show(shared, crowded, console)
        swap.show(groups, console)
        if len(reports) > 1:  # again: the first line has scrolled away
            console.rule()
            console.print(whole)
    if plot:
        report.save(reports, plot)
    if not fits:
        raise SystemExit(1)


@contextlib.contextmanager
def _told_of(target: str, name: str) -> Iterator[None]:
    """Errors say to which application of a config they belong."""
    try:
        yield
    except UserError as error:
        where = f"{target}: application '{name}': " if is_config(target) else ""
        raise ConfigError(f"{where}{error}") from None


def _list(console: Console) -> None:
    console.print("[bold]GPUs[/]: " + ", ".join(hardware.gpus()))
    console.print("[bold]Models known without network[/]:")
    for name in metadata.kept_models():
        console.print(f"  {name}")


def _targets(
    target: str, only: str | None, overrides: dict[str, Any]
) -> list[tuple[str, Model, ModelConfig, bool]]:
    """The models to plan, and whether their layout is given: a config's, or the one named."""
    if not is_config(target):
        config = ModelConfig(model=target, engine=overrides)
        sized = bool({"tensor_parallel_size", "pipeline_parallel_size"} & set(overrides))
        return [(target, load_model(config), config, sized)]
    path = Path(target)
    fleet = load(path)
    for finding in check_model.fallbacks(fleet):
        raise ConfigError(f"{path}: application '{finding.about}': {finding.text}")
    names = [only] if only else list(fleet.models)
    if not names:
        raise ConfigError(f"{path}: has no model to plan")
    found = []
    for name in names:
        if name not in fleet.models:
            raise ConfigError(f"{path}: has no model '{name}' (models: {', '.join(fleet.models)})")
        config = fleet.models[name]
        if why := check_model.undeployable(config):
            raise ConfigError(f"{path}: application '{name}': {why}")
        both = {"engine": {**config.engine, **overrides}}
        config = ModelConfig.model_validate(config.model_dump(exclude_unset=True) | both)
        found.append((name, load_model(config), config, True))
    return found


def _report(
    name: str,
    model: Model,
    config: ModelConfig,
    as_configured: bool,
    *,
    gpu_name: str | None,
    typical_length: int,
    prices: dict[str, float] | None,
) -> Report:
    if config.resources.device == "cpu" and gpu_name is None:
        on_cpu = verdict.of(cpu_plan(model, config), config).plan
        found = front_ends.on_plan(config, on_cpu, None)
        length = min(typical_length, on_cpu.engine.max_model_len)
        return Report(name, on_cpu, length, found, config, notes=report.notes_on(on_cpu))
    arguments = choose.arguments_of(config)
    asked = gpu_name or config.resources.accelerator_type
    gpu, instance = hardware.find(asked) if asked else (None, None)
    hint = _hint(model, arguments, gpu)
    choices = choose.per_gpu_type(model, arguments)
    if gpu is None:
        best = ec2.cheapest(choices, config, prices) if prices else choose.least(choices)
        gpu = best.gpu if best else hardware.gpus()["H200"]
    smallest = next(choice for choice in choices if choice.gpu is gpu)
    chosen = None if as_configured else smallest.plan
    plan = chosen or choose.plan_on(model, arguments, gpu)
    judged = verdict.of(plan, config, instance=instance, prices=prices)
    plan, good = judged.plan, judged.machines if judged.plan.fits else []
    notes = report.notes_on(plan)
    if either := hardware.either_size(asked):
        notes.insert(0, "; ".join(either))
    # The reasons against a part of a GPU say which part would do.
    layout_told = not config.resources.part_of_gpu and (judged.of_layout or plan.fits)
    needed = smallest.plan.parallel.gpus if smallest.plan else 1 << 30
    on = instance or (good[0].instance if good else None)
    return Report(
        name=name,
        plan=plan,
        typical_length=min(typical_length, plan.engine.max_model_len),
        front_ends=front_ends.on_plan(config, plan, front_ends.on_machine(on) if on else None),
        config=config,
        smallest=smallest if layout_told else None,
        choices=choices,
        lighter=choose.lighter(model, arguments, gpu, needed),
        machines=good,
        refused_machines=judged.refused,
        notes=notes,
        hint=hint,
    )


def _hint(model: Model, arguments: dict[str, Any], gpu: GPU | None) -> str | None:
    """A shorter context, where the model's own is longer than most want and takes more GPUs."""
    own = model.shape.max_position_embeddings
    if own <= _LONG_CONTEXT or arguments.get("max_model_len") is not None:
        return None
    shorter = arguments | {"max_model_len": _SHORTER}
    best = choose.smallest(model, shorter, gpu) if gpu else _best(model, shorter)
    whole = choose.smallest(model, arguments, best.gpu) if best else None
    if best is None or whole is None or best.plan is None:
        return None
    if whole.plan and whole.plan.parallel.gpus <= best.plan.parallel.gpus:
        return None
    return (
        f"its own context is {own:,} tokens; with -e max_model_len={_SHORTER} it fits on "
        f"{best.plan.parallel.gpus} × {best.gpu.name}"
    )


def _best(model: Model, arguments: dict[str, Any]) -> choose.Choice | None:
    return choose.least(choose.per_gpu_type(model, arguments))
