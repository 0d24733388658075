"""``serve-app plan``, to be registered by :mod:`serve_app.cli`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from serve_app.config.document import load
from serve_app.config.settings import ModelConfig
from serve_app.errors import ConfigError
from serve_app.planner import check_model, choose, front_ends, hardware, report, swap
from serve_app.planner.hardware import GPU, Instance
from serve_app.planner.loading import cpu_plan, load_model
from serve_app.planner.model import metadata
from serve_app.planner.model.checkpoint import Model
from serve_app.planner.report import Report
from serve_app.planner.targets import engine_arguments, is_config

_TYPICAL_LENGTH = 2048


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
    """Say whether a model fits, on which GPUs and machines, and for how many requests at once."""
    console = Console()
    if list_:
        _list(console)
        return
    if target is None:
        raise click.UsageError("name a config file or a model")
    priced = choose.read_prices(prices) if prices else None
    gpu, instance = hardware.find(gpu_name) if gpu_name else (None, None)
    reports = [
        _report(*found, gpu=gpu, instance=instance, typical_length=typical_length, prices=priced)
        for found in _targets(target, only, engine_arguments(overrides))
    ]
    if json_:
        found = [report.as_json(one) for one in reports]
        both = {"fits": all(one["fits"] for one in found), "models": found}
        click.echo(json.dumps(found[0] if len(found) == 1 else both, indent=2))
    else:
        for index, one in enumerate(reports):
            if index:
                console.rule()
            report.show(one, console)
        if is_config(target) and not only:
            swap.show(load(Path(target)), gpu, console)
    if plot:
        report.save(reports, plot)


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
    gpu: GPU | None,
    instance: Instance | None,
    typical_length: int,
    prices: dict[str, float] | None,
) -> Report:
    if config.resources.device == "cpu" and gpu is None:
        on_cpu = cpu_plan(model, config)
        found = front_ends.on_plan(config, on_cpu, None)
        return Report(name, on_cpu, typical_length, found, notes=report.notes_on(on_cpu))
    arguments = choose.arguments_of(config)
    if gpu is None and config.resources.accelerator_type:
        gpu, _ = hardware.find(config.resources.accelerator_type)
    choices = choose.per_gpu_type(model, arguments)
    if gpu is None:
        best = choose.default_choice(choices, prices, config)
        gpu = best.gpu if best else hardware.gpus()["H200"]
    smallest = next(choice for choice in choices if choice.gpu is gpu)
    chosen = None if as_configured else smallest.plan
    plan = chosen or choose.plan_on(model, arguments, gpu)
    good, refused = choose.machines(plan, config, prices) if plan.fits else ([], [])
    if instance is not None:
        refused = [one for one in refused if one.name == instance.name]
        good = [one for one in good if one.instance.name == instance.name]
    notes = report.notes_on(plan)
    if instance is not None and plan.fits and not good:
        why = refused[0].reason if refused else "it has other GPUs"
        plan = replace(plan, fits=False, reasons=(f"{instance.name}: {why}",))
    needed = smallest.plan.parallel.gpus if smallest.plan else 1 << 30
    on = instance or (good[0].instance if good else None)
    return Report(
        name=name,
        plan=plan,
        typical_length=min(typical_length, plan.engine.max_model_len),
        front_ends=front_ends.on_plan(config, plan, front_ends.on_machine(on) if on else None),
        smallest=smallest,
        choices=choices,
        lighter=choose.lighter(model, arguments, gpu, needed),
        machines=good,
        refused_machines=refused,
        notes=notes,
    )
