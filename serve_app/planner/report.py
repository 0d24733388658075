"""A plan's report: tables, bars and a picture for people, JSON for programs."""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from serve_app.config.settings import ModelConfig
from serve_app.errors import UserError
from serve_app.planner import ec2
from serve_app.planner.choose import Choice, Lighter
from serve_app.planner.ec2 import Machines, RefusedInstance
from serve_app.planner.front_ends import FrontEnds
from serve_app.planner.hardware import GIB
from serve_app.planner.model.tensors import PRECISION_BITS, parameter_bytes
from serve_app.planner.vllm.memory import GPUMemory, Plan

# Each part of a GPU's memory: field of GPUMemory, name, colour.
PARTS = (
    ("weights", "weights", "blue"),
    ("non_torch", "non-torch", "bright_black"),
    ("buffers", "buffers", "magenta"),
    ("activation", "activation peak", "yellow"),
    ("cudagraph", "CUDA graphs", "cyan"),
    ("kv_cache", "KV cache", "green"),
)


@dataclass(frozen=True)
class Report:
    """One model's report: the plan as asked for, and the alternatives."""

    name: str
    plan: Plan
    typical_length: int
    front_ends: FrontEnds
    config: ModelConfig
    smallest: Choice | None = None
    """The smallest layout on the same GPU type; None on a CPU."""
    choices: list[Choice] = field(default_factory=list)
    lighter: list[Lighter] = field(default_factory=list)
    machines: list[Machines] = field(default_factory=list)
    refused_machines: list[RefusedInstance] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hint: str | None = None
    """What to ask for instead, where the plan is for more than most want."""


def notes_on(plan: Plan) -> list[str]:
    """What a reader should know before trusting the numbers."""
    notes = []
    model = plan.model
    if not model.shape.known:
        notes.append(
            f"architecture '{model.shape.architecture}' is not known here: weights are the sum of "
            "the safetensors headers, attention is as config.json says"
        )
    elif not model.exact:
        notes.append("the weights' sizes are computed from config.json, not read from the weights")
    if model.shape.vision is not None:
        notes.append("the vision encoder's own peak is not modelled; leave it 1 to 2 GiB")
    if plan.engine.draft and plan.engine.draft.model and model.draft is None:
        notes.append("the draft model's metadata is not at hand; its memory is left out")
    if plan.engine.draft and plan.engine.draft.in_checkpoint and not plan.draft_weights:
        notes.append(
            "the MTP layers' weights are left out: neither config.json nor the weights tell them"
        )
    if plan.gpu.name != "CPU" and not plan.gpu.measured:
        notes.append(
            f"non-torch memory and CUDA graphs are an estimate on {plan.gpu.name}: measured on an "
            "H200"
        )
    if plan.parallel.gpus > 1:
        notes.append("buffers for communication between GPUs are an estimate")
    if plan.tight:
        notes.append(
            "a tight fit: less than 3 % of the GPU to spare, which is the planner's own error"
        )
    return notes


# --- JSON --------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain data. Bytes and tokens are whole numbers."""
    plan, engine, cache = report.plan, report.plan.engine, report.plan.cache
    found: dict[str, Any] = {
        "name": report.name,
        "model": plan.model.name,
        "fits": plan.fits,
        "gpu": plan.gpu.name,
        "gpus": plan.parallel.gpus,
        "tensor_parallel_size": plan.parallel.tensor,
        "pipeline_parallel_size": plan.parallel.pipeline,
        "data_parallel_size": plan.parallel.data,
        "enable_expert_parallel": plan.parallel.expert_parallel,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "dtype": engine.dtype,
        "kv_cache_dtype": engine.kv_dtype,
        "quantization": engine.quantization.label if engine.quantization else None,
        "parameters": plan.model.parameters,
        "weights_bytes_by_precision": {
            precision: parameter_bytes(plan.model.parameters, precision)
            for precision in PRECISION_BITS
        },
        "weights_bytes_on_all_gpus": plan.weights_on_all_gpus,
        "pinned_host_bytes": plan.host_bytes,
        "per_gpu": _gpu_json(plan.tightest),
        "stages": [_gpu_json(stage) for stage in plan.stages],
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "kv_cache_tokens": plan.kv_cache_tokens,
        "num_gpu_blocks": cache.num_blocks if plan.fits else 0,
        "block_size": engine.block_size,
        "max_concurrency": round(plan.concurrency(), 2),
        "typical": {
            "length": report.typical_length,
            "concurrency": round(plan.concurrency(report.typical_length), 2),
        },
        "reasons": list(plan.reasons),
        "hint": report.hint,
        "notes": report.notes,
        "metadata": {"source": plan.model.source, "exact": plan.model.exact},
        "frontends": {
            "count": report.front_ends.count,
            "reason": report.front_ends.why,
            "host_bytes": report.front_ends.host_bytes,
        },
    }
    if report.smallest is not None:
        found["smallest"] = _choice_json(report.smallest, report.config)
    found["quantizations"] = [asdict(option) for option in report.lighter]
    found["instances"] = [_machines_json(m) for m in report.machines]
    found["refused_instances"] = [
        {"instance_type": refused.name, "reason": refused.reason}
        for refused in report.refused_machines
    ]
    found["gpu_types"] = [_choice_json(choice, report.config) for choice in report.choices]
    return found


def _gpu_json(stage: GPUMemory) -> dict[str, int]:
    """Each part of the budget by its name; a KV cache that has less than no room is empty."""
    return {f"{part}_bytes": max(0, size) for part, size in asdict(stage).items()}


def _machines_json(machines: Machines) -> dict[str, Any]:
    return {
        "instance_type": machines.instance.name,
        "count": machines.count,
        "gpus_per_instance": machines.instance.gpus,
        "stranded_gpus": machines.stranded_gpus,
        "usd_per_hour": machines.price,
    }


def _choice_json(choice: Choice, config: ModelConfig) -> dict[str, Any]:
    if choice.plan is None:
        return {"gpu": choice.gpu.name, "fits": False, "reason": choice.refused}
    machines, _ = ec2.machines(choice.plan, config)
    return {
        "gpu": choice.gpu.name,
        "fits": True,
        "tensor_parallel_size": choice.plan.parallel.tensor,
        "pipeline_parallel_size": choice.plan.parallel.pipeline,
        "gpus": choice.plan.parallel.gpus,
        "kv_cache_tokens": choice.plan.kv_cache_tokens,
        "max_concurrency": round(choice.plan.concurrency(), 2),
        "instance_type": machines[0].instance.name if machines else None,
    }


# --- the terminal ------------------------------------------------------------------------------


def show(report: Report, console: Console) -> None:
    """Print the report: verdict, bar, numbers, then the alternatives."""
    plan = report.plan
    console.print(_verdict(report))
    console.print()
    console.print(bars(plan, width=min(72, max(20, console.width - 20))))
    console.print()
    console.print(_numbers(report))
    for heading, table in (
        ("Quantized, it would need fewer GPUs", _lighter_table(report.lighter)),
        (f"EC2 machines for one replica on {plan.gpu.name}", _machine_table(report.machines)),
        ("Smallest layout per GPU type", _choice_table(report.choices, report.config)),
    ):
        if table is not None:
            console.print(f"\n[bold]{heading}[/]")
            console.print(table)
    if report.machines:
        for refused in report.refused_machines:
            console.print(f"  [dim]not {refused.name}: {refused.reason}[/]")
    for choice in report.choices:
        if choice.plan is None:
            console.print(f"  [dim]not {choice.gpu.name}: {choice.refused}[/]")
    for note in report.notes:
        console.print(f"[dim]note: {note}[/]")


def save(reports: list[Report], path: Path) -> None:
    """Verdicts and bars as a picture, for a document.

    Raises:
        UserError: the file is not called .svg, or cannot be written.
    """
    if path.suffix != ".svg":
        raise UserError(f"{path}: the picture is an SVG; call it {path.with_suffix('.svg')}")
    drawn = Console(record=True, file=io.StringIO(), width=110)
    for report in reports:
        drawn.print(_verdict(report), bars(report.plan, width=80), "")
    try:
        path.write_text(drawn.export_svg(title="serve-app plan: memory of one GPU"))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


_ANSWERS = {
    (True, False): ("fits", "bold green"),
    (True, True): ("barely fits", "bold yellow"),
    (False, False): ("does not fit", "bold red"),
}


def _verdict(report: Report) -> RenderableType:
    plan = report.plan
    where = "on a CPU" if plan.gpu.name == "CPU" else f"on {plan.parallel.gpus} × {plan.gpu.name}"
    title = Text.assemble(
        (report.name, "bold"), f" {where}",
        f" ({plan.parallel})" if plan.parallel.gpus > 1 else "", ": ",
        _ANSWERS[plan.fits, plan.tight],
    )  # fmt: skip
    lines: list[RenderableType] = [title]
    if plan.fits:
        lines.append(Text(f"  {_where_and_for_whom(report)}"))
    lines += [Text(f"  {reason}") for reason in plan.reasons]
    if report.hint:
        lines.append(Text(f"  {report.hint}"))
    if not plan.fits and report.smallest is not None:
        smallest = report.smallest
        lines.append(
            Text(f"  smallest that fits on {smallest.gpu.name}: {smallest.plan.parallel}")
            if smallest.plan
            else Text(f"  no layout fits on {smallest.gpu.name}: {smallest.refused}")
        )
    return Group(*lines)


def _where_and_for_whom(report: Report) -> str:
    """The machines of one replica, and how many it serves at once."""
    plan = report.plan
    where = []
    if report.machines:
        best = report.machines[0]
        idle = best.stranded_gpus
        spare = f", {idle} GPU{'s' * (idle > 1)} idle" if idle else ""
        where.append(f"{best.count} × {best.instance.name}{spare}")
    most = plan.engine.max_num_seqs * plan.parallel.data
    length, room = report.typical_length, plan.room(report.typical_length)
    if not plan.groups:
        return "; ".join([*where, f"{most:,} requests at once"])
    users = f"{math.floor(plan.concurrency(length)):,} users at once with {length:,} tokens each"
    if room > most:
        users += f" (max_num_seqs; its KV cache holds {math.floor(room):,})"
    return "; ".join([*where, users])


def bars(plan: Plan, *, width: int) -> RenderableType:
    """A stacked bar of one GPU's memory for each pipeline stage, at most ``width`` characters."""
    lines: list[RenderableType] = []
    full = max(plan.stages[0].total, max(_used(stage) for stage in plan.stages))
    for index, stage in enumerate(plan.stages):
        label = f"stage {index}" if len(plan.stages) > 1 else "one GPU"
        if plan.gpu.name == "CPU":
            label = "host"
        bar = Text(f"{label:>8} ")
        edge = 0.0
        drawn = 0
        for part, _, colour in PARTS:
            edge += max(0, getattr(stage, part)) / full * width
            bar.append("█" * (round(edge) - drawn), style=colour)
            drawn = max(drawn, round(edge))
        bar.append("░" * (width - drawn), style="dim")
        bar.append(f" {full / GIB:.{0 if full >= 10 * GIB else 1}f} GiB")
        lines.append(bar)
    for row in (PARTS[:3], PARTS[3:]):  # a terminal of 80 columns has room for three
        legend = Text(" " * 9)
        for part, name, colour in row:
            if part == "kv_cache" and not plan.groups:
                continue
            if plan.gpu.name == "CPU" and not getattr(plan.tightest, part):
                continue  # it has no CUDA
            size = max(0, getattr(plan.tightest, part))
            legend.append("█ ", style=colour)
            legend.append(f"{name} {size / GIB:.1f}  ")
        lines.append(legend)
    if plan.gpu.name != "CPU":
        lines.append(Text(" " * 9 + "░ reserved (outside gpu_memory_utilization)", style="dim"))
    return Group(*lines)


def _used(stage: GPUMemory) -> int:
    return sum(max(0, getattr(stage, part)) for part, *_ in PARTS)


def _numbers(report: Report) -> Table:
    plan, engine = report.plan, report.plan.engine
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    precision = engine.quantization.label if engine.quantization else engine.dtype
    table.add_row("parameters", f"{plan.model.parameters / 1e9:.2f} B, {precision}")
    on_cpu = plan.gpu.name == "CPU"
    table.add_row(
        "weights" if on_cpu else "weights over all GPUs",
        f"{plan.weights_on_all_gpus / GIB:.1f} GiB",
    )
    table.add_row(
        "in other precisions",
        ", ".join(
            f"{name} {parameter_bytes(plan.model.parameters, name) / 1e9:.0f} GB"
            for name in ("fp32", "bf16", "int8", "int4")
        ),
    )
    table.add_row(
        "batch", f"{engine.max_num_batched_tokens} tokens, {engine.max_num_seqs} requests"
    )
    if plan.groups:
        table.add_row(
            "KV cache",
            f"{plan.kv_cache_tokens:,} tokens ({engine.kv_dtype}, "
            f"{plan.kv_bytes_per_token / 1024:g} KiB per token"
            f"{'' if on_cpu else ' and GPU'})",
        )
        table.add_row(
            "requests at once",
            f"{plan.concurrency():.1f} with {engine.max_model_len:,} tokens each"
            + (
                f", {math.floor(plan.concurrency(report.typical_length)):,} with "
                f"{report.typical_length:,}"
                if report.typical_length != engine.max_model_len
                else ""
            ),
        )
    else:
        table.add_row("KV cache", "none (an encoder)")
    if plan.host_bytes:
        table.add_row(
            "host memory", f"{plan.host_bytes / GIB:.1f} GiB pinned for what is offloaded"
        )
    table.add_row("front ends", _front_ends(report.front_ends))
    table.add_row("metadata", plan.model.source)
    return table


def _front_ends(found: FrontEnds) -> str:
    more = f" (+{found.host_bytes / GIB:.1f} GiB host)" if found.host_bytes else ""
    return f"{found.count}{more}: {found.why}"


def _lighter_table(lighter: list[Lighter]) -> Table | None:
    if not lighter:
        return None
    table = Table(box=None, pad_edge=False)
    for column in ("precision", "GPUs", "weights", "how"):
        table.add_column(column, header_style="dim")
    for x in lighter:
        table.add_row(x.name, str(x.gpus), f"{x.weights_bytes / GIB:.1f} GiB", x.how)
    return table


def _machine_table(machines: list[Machines]) -> Table | None:
    if not machines:
        return None
    table = Table(box=None, pad_edge=False)
    priced = any(m.price is not None for m in machines)
    columns = ["instance", "machines", "GPUs each", "idle GPUs"] + (["USD/h"] if priced else [])
    for column in columns:
        table.add_column(column, header_style="dim")
    for m in machines[:6]:
        row = [m.instance.name, str(m.count), str(m.instance.gpus), str(m.stranded_gpus)]
        if priced:
            row.append(f"{m.price:.2f}" if m.price is not None else "?")
        table.add_row(*row)
    return table


def _choice_table(choices: list[Choice], config: ModelConfig) -> Table | None:
    if not choices:
        return None
    table = Table(box=None, pad_edge=False)
    for column in ("GPU", "layout", "KV tokens", "requests", "smallest machines"):
        table.add_column(column, header_style="dim", no_wrap=True)
    for choice in choices:
        if choice.plan is None:
            continue
        machines, _ = ec2.machines(choice.plan, config)
        best = machines[0] if machines else None
        machine = f"{best.count} × {best.instance.name}" if best else "none on EC2"
        if best and best.stranded_gpus:
            machine += f", {best.stranded_gpus} idle"
        parallel = choice.plan.parallel
        table.add_row(
            choice.gpu.name,
            str(parallel) if parallel.pipeline > 1 else f"TP {parallel.tensor}",
            f"{choice.plan.kv_cache_tokens:,}" if choice.plan.groups else "-",
            f"{choice.plan.concurrency():.1f}",
            machine,
        )
    return table
