"""How close the planner comes to what vLLM allocates, measured on a real GPU.

Three commands::

    python benchmarks/planner_accuracy.py run --out DIR [--budget-s 560] [CASE…]
    python benchmarks/planner_accuracy.py compare --recorded FILE [--write docs/planner-accuracy.md]
    python benchmarks/planner_accuracy.py cases

``run`` needs a GPU, vLLM and torch, and nothing of serve_app. Each case is one engine start in
a process of its own, with dummy weights: vLLM resolves its defaults as for ``vllm serve``, loads,
profiles, estimates CUDA graphs and sizes the KV cache; its own numbers are recorded and the
process ends before it would capture and warm up. ``compare`` needs serve_app and no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GIB = 1 << 30

_KERNELS = re.compile(r"Using .*(?:kernel|backend|Backend|Kernel|Linear).*")
"""vLLM's lines on what computes a layer; some of them hold weights in a form of their own."""

SETTLE_S = 1.0
"""Between two engines, for the driver to take the first one's memory back."""

# Kernels that would be compiled at the first batch, for minutes; memory does not depend on them.
ENVIRONMENT = {
    "VLLM_USE_DEEP_GEMM": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Case:
    """One engine start. ``layers`` keeps only that many of the model's layers."""

    name: str
    model: str
    engine: dict[str, Any] = field(default_factory=dict)
    layers: int | None = None


def _case(name: str, model: str, utilization: float, length: int, **engine: Any) -> Case:
    layers = engine.pop("layers", None)
    arguments = {"gpu_memory_utilization": utilization, "max_model_len": length, **engine}
    return Case(name, model, arguments, layers)


EAGER = {"enforce_eager": True}

# The most telling first: a run that is out of time leaves out the last.
CASES = [
    _case("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", 0.92, 8192, **EAGER),
    _case("llama-8b graphs", "meta-llama/Llama-3.1-8B-Instruct", 0.92, 8192),
    _case("qwen3-32b-fp8", "Qwen/Qwen3-32B-FP8", 0.92, 40960, **EAGER),
    _case("llama-70b-fp8", "RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic", 0.92, 8192, **EAGER),
    _case("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", 0.92, 40960, **EAGER),
    _case("deepseek-v2-lite", "deepseek-v2-lite", 0.92, 32768, **EAGER),
    _case("llama-8b long", "meta-llama/Llama-3.1-8B-Instruct", 0.80, 131072, **EAGER),
    _case("qwen3-32b-fp8 graphs", "Qwen/Qwen3-32B-FP8", 0.80, 8192),
    _case("llama-70b-fp8 low", "RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic", 0.80, 32768, **EAGER),
    _case("deepseek-v3, 6 layers", "deepseek-ai/DeepSeek-V3", 0.92, 8192, layers=6, **EAGER),
    _case("qwen3-30b-a3b graphs", "Qwen/Qwen3-30B-A3B", 0.80, 8192),
    _case("gemma-3-1b", "gemma-3-1b-it", 0.92, 32768, **EAGER),
    _case("qwen2.5-32b-awq", "Qwen/Qwen2.5-32B-Instruct-AWQ", 0.80, 32768, **EAGER),
    _case("qwen2.5-7b-gptq", "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", 0.92, 8192, **EAGER),
    _case("smollm2-135m graphs", "HuggingFaceTB/SmolLM2-135M-Instruct", 0.80, 2048),
    _case("deepseek-v2-lite graphs", "deepseek-v2-lite", 0.80, 8192),
    _case("llama-8b fp8 kv", "meta-llama/Llama-3.1-8B-Instruct", 0.92, 32768,
          kv_cache_dtype="fp8", max_num_seqs=256, **EAGER),
    _case("llama-8b small batch", "meta-llama/Llama-3.1-8B-Instruct", 0.92, 8192,
          max_num_seqs=256, max_num_batched_tokens=2048, **EAGER),
]  # fmt: skip

# On several GPUs, as one tensor-parallel group: mxfp4, AWQ, fewer KV heads than GPUs (one with
# state space layers, one small), MLA, the README's first example with its graphs, experts in fp8.
for _gpus in (2, 4, 8):
    for _name, _model, _length, _more in (
        ("gpt-oss-120b", "openai/gpt-oss-120b", 32768, EAGER),
        ("qwen2.5-32b-awq", "Qwen/Qwen2.5-32B-Instruct-AWQ", 32768, EAGER),
        ("qwen3-next-80b", "Qwen/Qwen3-Next-80B-A3B-Instruct", 32768, EAGER),
        ("deepseek-v3, 12 layers", "deepseek-ai/DeepSeek-V3", 8192, EAGER | {"layers": 12}),
        ("gemma-3-1b", "gemma-3-1b-it", 32768, EAGER),
        ("llama-70b graphs", "meta-llama/Llama-3.3-70B-Instruct", 8192, {"max_num_seqs": 256}),
        ("qwen3-235b-fp8", "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8", 8192, EAGER),
    ):
        _more = _more | {"tensor_parallel_size": _gpus}
        CASES.append(_case(f"{_name}, TP {_gpus}", _model, 0.92, _length, **_more))


def gpus_of(case: Case) -> int:
    """How many GPUs the case takes."""
    return int(case.engine.get("tensor_parallel_size", 1))


def model_config(case: Case) -> dict[str, Any]:
    """The model's ``config.json``, with fewer layers where the case says so."""
    kept = ROOT / "serve_app/data/models" / case.model.replace("/", "--") / "config.json"
    path = kept if kept.is_file() else ROOT / "benchmarks/shapes" / f"{case.model}.json"
    config: dict[str, Any] = json.loads(path.read_text())
    if case.layers is not None:
        config["num_hidden_layers"] = case.layers
        config.pop("num_nextn_predict_layers", None)
    return without_weights(config)


GPTQ_MODULES = [
    [f"self_attn.{name}_proj" for name in "qkvo"],
    [f"mlp.{name}_proj" for name in ("gate", "up", "down")],
]


def without_weights(config: dict[str, Any]) -> dict[str, Any]:
    """The config with what vLLM looks for in the weights.

    Which modules of a GPTQ model are quantized (``AutoGPTQConfig.maybe_update_config``): without
    weights it takes none for quantized.
    """
    quantization = config.get("quantization_config", {})
    if quantization.get("quant_method") != "gptq":
        return config
    named = {"modules_in_block_to_quantize": GPTQ_MODULES} | {
        key: value for key, value in quantization.items() if value is not None
    }
    return config | {"quantization_config": named}


# --- on the GPU --------------------------------------------------------------------------------


class _Measured(Exception):
    """Raised inside vLLM once all is recorded, to end the start-up there."""


def start_engine(case: Case) -> dict[str, Any]:
    """Start vLLM's engine as ``vllm serve`` would, up to the size of its KV cache."""
    import vllm
    import vllm.v1.engine.core as core
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.executor.abstract import Executor

    sys.path.insert(0, str(ROOT))  # for the processes of the ranks too
    from benchmarks.planner_worker import RECORDS

    seen: dict[str, Any] = {}
    _record_capacity(core, seen)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[RECORDS] = folder
        (Path(folder) / "config.json").write_text(json.dumps(model_config(case)))
        arguments = EngineArgs(
            model=folder, load_format="dummy", skip_tokenizer_init=True,
            worker_cls="benchmarks.planner_worker.Worker", **case.engine,
        )  # fmt: skip
        config = arguments.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        with contextlib.suppress(_Measured):
            core.EngineCore(config, Executor.get_class(config), log_stats=False)
        ranks = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("rank-*"))]
    scheduler, compilation = config.scheduler_config, config.compilation_config
    return {
        "case": asdict(case),
        "vllm": vllm.__version__,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "in_flight_tokens": config.max_in_flight_tokens,
        "v2_model_runner": config.use_v2_model_runner,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "cudagraph_mode": str(compilation.cudagraph_mode),
        "cudagraph_sizes": list(compilation.cudagraph_capture_sizes or []),
        **ranks[0],
        "weights_of_ranks": [rank["weights"] for rank in ranks],
        **seen,
    }


def _record_capacity(core: Any, seen: dict[str, Any]) -> None:
    """Keep the KV cache's size as vLLM logs it, and stop there."""
    update = core.update_kv_cache_capacity

    def recorded(config: Any, kv_cache_config: Any) -> None:
        update(config, kv_cache_config)
        seen.update(
            num_gpu_blocks=kv_cache_config.num_blocks,
            block_size=config.cache_config.block_size,
            kv_cache_tokens=config.cache_config.kv_cache_size_tokens,
            max_concurrency=config.cache_config.kv_cache_max_concurrency,
            groups=[
                {
                    "spec": type(group.kv_cache_spec).__name__,
                    "layers": len(group.layer_names),
                    "page_bytes": group.kv_cache_spec.page_size_bytes,
                }
                for group in kv_cache_config.kv_cache_groups
            ],
        )
        raise _Measured

    core.update_kv_cache_capacity = recorded


def run(
    names: list[str], out: Path, budget_s: float, case_s: float, *, spawn: bool, gpus: int = 1
) -> None:
    """Start the engines one after another; what is recorded is on disk after each.

    Without names, those that take so many GPUs.

    A case's process is forked from this one, where vLLM is imported but CUDA untouched, so that
    the import is paid once; ``spawn`` starts a fresh interpreter for each instead.
    """
    out.mkdir(parents=True, exist_ok=True)
    target = out / "planner_h200.json"
    begun = time.monotonic()
    records: list[dict[str, Any]] = []
    for case in CASES:
        if case.name not in names if names else gpus_of(case) != gpus:
            continue
        left = budget_s - (time.monotonic() - begun)
        if left < 30:
            print(f"{case.name}: skipped, out of time", flush=True)
            continue
        started = time.monotonic()
        record = _in_own_process(case, min(case_s, left), spawn=spawn)
        record["seconds"] = round(time.monotonic() - started, 1)
        records.append(record)
        target.write_text(json.dumps({"records": records}, indent=1) + "\n")
        print(_summary(record), flush=True)
        time.sleep(SETTLE_S)


def _in_own_process(case: Case, timeout_s: float, *, spawn: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "record.json", Path(folder) / "log"
        pid = 0 if spawn else os.fork()
        if spawn:
            command = [sys.executable, __file__, "one", case.name, str(result), str(log)]
            pid = subprocess.Popen(command, start_new_session=True).pid
        elif pid == 0:
            _child(case, result, log)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if os.waitpid(pid, os.WNOHANG)[0]:
                break
            time.sleep(0.2)
        else:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, 9)  # its workers
        said = log.read_text(errors="replace") if log.is_file() else ""
        if result.is_file():
            record: dict[str, Any] = json.loads(result.read_text())
            return record | {"kernels": sorted(set(_KERNELS.findall(said)))}
        tail = said[-3000:]
        return {"case": asdict(case), "failed": tail or f"no result within {timeout_s:.0f} s"}


def _child(case: Case, result: Path, log: Path) -> None:
    """One engine start, in a process that ends here. The record appears whole or not at all."""
    code = 1
    try:
        with contextlib.suppress(PermissionError):  # with --spawn it leads a session already
            os.setsid()
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            record = json.dumps(start_engine(case))
        result.with_suffix(".part").write_text(record)
        result.with_suffix(".part").rename(result)
        code = 0
    except BaseException:
        with log.open("a") as file:
            traceback.print_exc(file=file)
    finally:
        os._exit(code)


def _summary(record: dict[str, Any]) -> str:
    name = record["case"]["name"]
    if "kv_cache_tokens" not in record:
        reason = str(record.get("failed", "")).strip().splitlines()
        return f"{name}: FAILED after {record['seconds']} s: {reason[-1] if reason else '?'}"
    return (
        f"{name}: {record['seconds']} s, weights {record['weights'] / GIB:.2f} GiB, "
        f"activation {record['activation_peak'] / GIB:.2f}, "
        f"consumed {record['total_consumed'] / GIB:.2f}, "
        f"graphs {record['cudagraph_estimate'] / GIB:.2f}, "
        f"KV {record['available_kv_cache'] / GIB:.2f} GiB = {record['kv_cache_tokens']} tokens"
    )


# --- against the planner -----------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Planned against measured, in bytes and tokens; errors as a share of what was measured."""

    record: dict[str, Any]
    weights: int
    non_torch_and_buffers: int
    activation: int
    cudagraph: int
    kv_cache: int
    kv_cache_tokens: int

    @property
    def name(self) -> str:
        return str(self.record["case"]["name"])

    @property
    def weights_error(self) -> float:
        return self.weights / int(self.record["weights"]) - 1

    @property
    def tokens_error(self) -> float:
        return self.kv_cache_tokens / int(self.record["kv_cache_tokens"]) - 1


def compare(recorded: Path) -> list[Comparison]:
    """Plan each recorded case and set it beside what vLLM measured."""
    from dataclasses import replace

    from serve_app.planner import hardware
    from serve_app.planner.model import metadata
    from serve_app.planner.vllm import defaults, memory

    comparisons = []
    for record in json.loads(recorded.read_text())["records"]:
        if "kv_cache_tokens" not in record:
            continue
        raw = dict(record["case"])
        case = Case(raw["name"], raw["model"], raw["engine"], raw["layers"])
        model = metadata._model(case.model, model_config(case), None, "benchmark")
        gpu, _ = hardware.find("H100" if "H100" in record.get("gpu", "") else "H200")
        gpu = replace(gpu, memory_bytes=record["total_memory"])
        plan = memory.plan(model, defaults.resolve(case.engine, model.shape, gpu), gpu)
        stage = plan.tightest
        comparisons.append(
            Comparison(
                record,
                stage.weights,
                stage.non_torch + stage.buffers,
                stage.activation,
                stage.cudagraph,
                stage.kv_cache,
                plan.kv_cache_tokens,
            )
        )
    return comparisons


def table(comparisons: list[Comparison]) -> str:
    """The accuracy table, as Markdown; each cell is planned / measured."""
    head = (
        "| Case | Util. | Context | Graphs | Weights GiB | Error | Activation GiB "
        "| Non-torch + buffers GiB | CUDA graphs GiB | KV cache GiB | KV tokens | Error |"
    )
    lines = [head, "|---" * 12 + "|"]
    for c in comparisons:
        r, arguments = c.record, c.record["case"]["engine"]

        def pair(planned: int, measured: int) -> str:
            return f"{planned / GIB:.2f} / {measured / GIB:.2f}"

        lines.append(
            f"| {c.name} | {arguments['gpu_memory_utilization']:g} | {arguments['max_model_len']} "
            f"| {len(r['cudagraph_sizes']) if not arguments.get('enforce_eager') else 'no'} "
            f"| {pair(c.weights, r['weights'])} | {c.weights_error:+.2%} "
            f"| {pair(c.activation, r['activation_peak'])} "
            f"| {pair(c.non_torch_and_buffers, r['total_consumed'] - r['weights'])} "
            f"| {pair(c.cudagraph, r['cudagraph_estimate'])} "
            f"| {pair(c.kv_cache, r['available_kv_cache'])} "
            f"| {c.kv_cache_tokens:,} / {r['kv_cache_tokens']:,} | {c.tokens_error:+.2%} |"
        )
    return "\n".join(lines)


_BEGIN, _END = "<!-- table: planner_accuracy.py compare -->", "<!-- end of table -->"


def write_table(path: Path, text: str) -> None:
    """Put the table between the document's two markers."""
    document = path.read_text()
    head, rest = document.split(_BEGIN)
    path.write_text(f"{head}{_BEGIN}\n{text}\n{_END}{rest.split(_END)[1]}")


def _import_before_fork() -> bool:
    """Import what every engine needs; False where that alone initialises CUDA."""
    begun = time.monotonic()
    import torch
    import vllm.engine.arg_utils
    import vllm.v1.engine.core
    import vllm.v1.worker.gpu_worker  # noqa: F401

    print(f"imports took {time.monotonic() - begun:.0f} s", flush=True)
    return not torch.cuda.is_initialized()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    on_gpu = commands.add_parser("run", help="record vLLM's own numbers on this machine's GPU")
    on_gpu.add_argument("names", nargs="*", metavar="CASE", help="default: all of --gpus")
    on_gpu.add_argument("--gpus", type=int, default=1, help="of each case's tensor-parallel group")
    on_gpu.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    on_gpu.add_argument("--budget-s", type=float, default=560, help="seconds for all cases")
    on_gpu.add_argument("--case-s", type=float, default=150, help="seconds for one case at most")
    on_gpu.add_argument("--spawn", action="store_true", help="a fresh interpreter for each case")
    one = commands.add_parser("one", help="what --spawn runs")
    one.add_argument("name", metavar="CASE")
    one.add_argument("result", type=Path)
    one.add_argument("log", type=Path)
    beside = commands.add_parser("compare", help="set the planner beside recorded numbers")
    beside.add_argument("--recorded", type=Path, required=True)
    beside.add_argument("--write", type=Path, help="the document whose table to replace")
    commands.add_parser("cases", help="list the cases")
    arguments = parser.parse_args()
    if arguments.command == "cases":
        for case in CASES:
            print(case.name, case.model, json.dumps(case.engine))
    elif arguments.command == "compare":
        text = table(compare(arguments.recorded))
        print(text)
        if arguments.write:
            write_table(arguments.write, text)
    elif arguments.command == "one":
        os.environ.update(ENVIRONMENT)
        case = next(case for case in CASES if case.name == arguments.name)
        _child(case, arguments.result, arguments.log)
    else:
        os.environ.update(ENVIRONMENT)
        begun = time.monotonic()
        spawn = arguments.spawn or not _import_before_fork()
        left = arguments.budget_s - (time.monotonic() - begun)
        run(
            arguments.names, arguments.out, left, arguments.case_s, spawn=spawn,
            gpus=arguments.gpus,
        )  # fmt: skip
        driver = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"]
        subprocess.run(driver, check=False)


if __name__ == "__main__":
    main()
