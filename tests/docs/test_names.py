"""Names in the documentation are those of the code: settings, metrics, variables, paths, options.

docs/decisions*.md are left out where names count: they also tell of what was not chosen.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import click
import fragments
import pytest
import yaml
from harness import documented, exported_metrics
from harness.documented import Found
from harness.processes import REPO

from serve_app.cli import cli
from serve_app.config import engine_args
from serve_app.errors import UserError

PAGES = [page for page in documented.PAGES if not page.startswith("docs/decisions")]

SPANS = [s for page in (*PAGES, *documented.COMMENTED) for s in documented.spans(page)]
CODE = [
    Found(line, block.page, block.line + number)
    for page in PAGES
    for block in documented.blocks(page)
    for number, line in enumerate(block.text.splitlines())
]
PROSE = [text for page in PAGES for text in documented.prose(page)]


@cache
def our_words() -> set[str]:
    """Every identifier in what is not documentation."""
    folders = ("serve_app", "tests", "benchmarks", "tools", "configs", "kuberay", "requirements")
    files = ("Makefile", "Dockerfile", "pyproject.toml")
    ours = [p for p in (REPO / f for f in (*folders, *files)) if p.exists()]
    here = Path(__file__).parent
    return documented.words_of(*(f for root in ours for f in _files(root) if here not in f.parents))


def _files(root: Path) -> Iterator[Path]:
    return (f for f in ([root] if root.is_file() else root.rglob("*")) if f.is_file())


@cache
def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def wrong(found: Iterator[tuple[Found, str]]) -> None:
    lines = [f"{one.where}: `{one.text.strip()}`: {why}" for one, why in found]
    assert not lines, "\n".join(["", *lines])


# --- settings -------------------------------------------------------------------------------

_DOTTED = re.compile(
    r"(?:args|engine|resources|autoscaling|http_options|cache|redis|ingress|upgrade|head|gateway)"
    r"(?:\.[a-z]\w*)+"
)
_KEY_AND_VALUE = re.compile(r"[a-z][a-z0-9_]*: \S.*")
_NAME = re.compile(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)+")

OTHERS_NAMES = {
    "eof_received": "asyncio's",
    "connection_lost": "asyncio's",
    "mux_h1": "HAProxy's",
    "model_name": "LiteLLM's",
    "model_ids": "Open WebUI's",
    "bind_tools": "LangChain's",
    "guided_choice": "vLLM's of earlier versions",
    "guided_regex": "vLLM's of earlier versions",
    "guided_json": "vLLM's of earlier versions",
}
"""Names with underscores that stand in no file of ours."""


def test_settings_with_a_dot_exist() -> None:
    wrong(
        (span, "there is no such setting")
        for span in SPANS
        for path in [re.split(r"[:=]", span.text)[0].strip()]
        if _DOTTED.fullmatch(path) and not path.endswith((".py", ".yaml", ".io"))
        if not fragments.is_setting(path)
    )


def test_settings_with_a_value_are_taken() -> None:
    def problems() -> Iterator[tuple[Found, str]]:
        for span in SPANS:
            text = re.sub(r"^(args|engine|resources|autoscaling)\.", "", span.text)
            key = text.partition(":")[0]
            if not _KEY_AND_VALUE.fullmatch(text):
                continue
            if key not in fragments.setting_names() and (
                "_" not in key or key in OTHERS_NAMES or in_packages({key})
            ):
                continue  # a label of Kubernetes, a line that was printed, a field of a request
            inside = text != span.text and span.text.split(".")[0]
            if inside in ("engine", "resources", "autoscaling"):
                text = f"{inside}: {{{text}}}"
            try:
                fragments.check(text, span=True)
            except (UserError, AssertionError, yaml.YAMLError) as error:
                yield span, str(error)

    wrong(problems())


def test_names_with_underscores_are_of_the_code() -> None:
    """A setting, a function or a column that was renamed is found nowhere any more."""
    unknown = [
        span
        for page in PAGES
        for span in documented.spans(page)
        if _NAME.fullmatch(span.text)
        if span.text not in our_words() | fragments.setting_names() | OTHERS_NAMES.keys()
        if span.text not in words_of_named_files(page)
    ]
    theirs = in_packages({span.text for span in unknown})
    wrong(
        (span, "is in no file of ours, nor of vLLM's; if it is of others, add it to OTHERS_NAMES")
        for span in unknown
        if span.text not in theirs
    )


def in_packages(names: set[str]) -> set[str]:
    """Those of the names that the sources of vLLM or of OpenAI's SDK have."""
    if not names:
        return set()
    pattern = "|".join(sorted(names))
    folders = [package("vllm"), package("openai")]
    grep = ["grep", "-rhowE", "--include=*.py", f"({pattern})", *map(str, folders)]
    return set(subprocess.run(grep, capture_output=True, text=True).stdout.split())


@cache
def words_of_named_files(page: str) -> set[str]:
    """The identifiers in the sources of Ray and vLLM that a page names."""
    text = (REPO / page).read_text()
    named = set(re.findall(r"[\w/]+/\w+\.py", text))
    files = [
        package(name).parent / path
        for path in named
        for name in ("ray", "vllm")
        if path.startswith(f"{name}/") and (package(name).parent / path).is_file()
    ]
    return documented.words_of(*files)


# --- metrics --------------------------------------------------------------------------------

_METRIC = re.compile(r"\b(?:serve_app_gateway_|vllm:|ray_)\w*\w|\b_[a-z]+(?:_[a-z]+)+\b")


@cache
def metric_names() -> set[str]:
    """Metrics that a real run exported, by Ray's names and by those of Prometheus after us.

    And the few that ``GET /metrics`` alone has.
    """
    found = set()
    for name, metric in exported_metrics.recorded().items():
        ends = ("", "_bucket", "_count", "_sum") if metric.kind == "histogram" else ("",)
        for shown in (name, name.removeprefix("ray_"), re.sub("^ray_vllm_", "vllm:", name)):
            found |= {shown + end for end in ends}
    page_alone = (REPO / "serve_app/gateway/exposition.py").read_text()
    return found | set(re.findall(r'"(serve_app_gateway_\w+)"', page_alone))


def test_metrics_are_exported() -> None:
    def problems() -> Iterator[tuple[Found, str]]:
        for one in [*SPANS, *CODE]:
            for name in _METRIC.findall(one.text):
                if name.startswith("_"):
                    # The end of a name, whose beginning stands before it in the sentence.
                    known = any(metric.endswith(name) for metric in metric_names())
                    known = known or name != one.text or name in our_words()
                else:
                    known = name in metric_names() or one.text.partition(name)[2].startswith("*")
                    known = known or (name.startswith("ray_") and name in our_words())
                if not known:
                    yield one, f"no run has exported {name} (make metrics records them)"

    wrong(problems())


# --- environment variables ------------------------------------------------------------------

_VARIABLE = re.compile(r"\b(?:SERVE_APP|RAY|VLLM)_[A-Z0-9_]*[A-Z0-9]\b(?!…|\*)")


@cache
def variables_of_others() -> set[str]:
    """What Ray and vLLM read, by the files that say so."""
    ray, vllm = package("ray"), package("vllm")
    return documented.words_of(
        ray / "serve/_private/constants.py",
        ray / "serve/_private/haproxy.py",
        ray / "_private/ray_constants.py",
        ray / "_private/authentication",
        vllm / "envs.py",
    )


def test_environment_variables_are_read_by_somebody() -> None:
    wrong(
        (one, f"neither our code nor Ray's or vLLM's tables of variables have {name}")
        for one in [*SPANS, *CODE, *PROSE]
        for name in _VARIABLE.findall(one.text)
        if name not in (our_words() if name.startswith("SERVE_APP") else
                        our_words() | variables_of_others())
    )  # fmt: skip


# --- paths ----------------------------------------------------------------------------------

_OUR_PATH = re.compile(
    r"(?<![\w./<-])(?:serve_app|tests|docs|configs|kuberay|benchmarks|tools|requirements)"
    r"/[\w./*<>-]*"
)
_MODULE = re.compile(r"(?<![\w./])(?:\w+/)*\w+\.py\b")
_NOT_WRITTEN_YET = re.compile(r"[<*]|REPLACE|kuberay/kuberay-operator")


@cache
def our_files() -> tuple[str, ...]:
    roots = ("serve_app", "tests", "benchmarks", "tools", "requirements")
    found = [f for root in roots for f in _files(REPO / root) if "__pycache__" not in f.parts]
    return tuple(f"/{path.relative_to(REPO)}" for path in found)


@pytest.mark.parametrize("page", documented.PAGES)
def test_paths_of_the_repository_exist(page: str) -> None:
    here = [*documented.spans(page), *documented.prose(page)]
    wrong(
        (one, f"there is no {path}")
        for one in here
        for path in [p.rstrip(".") for p in _OUR_PATH.findall(one.text)]
        if not _NOT_WRITTEN_YET.search(path)
        and not (REPO / path).exists()
        and not (REPO / "serve_app" / path).exists()
    )


@pytest.mark.parametrize("page", PAGES)
def test_modules_exist(page: str) -> None:
    """Ours by any part of their path from its end; Ray's and vLLM's by the same."""
    wrong(
        (one, f"neither we nor Ray nor vLLM have {path}")
        for one in [*documented.spans(page), *documented.prose(page)]
        for path in _MODULE.findall(one.text)
        if not any(file.endswith(f"/{path}") for file in our_files())
        if "/".join(path.split("/")[-2:]) not in modules_of_others()
    )


@cache
def modules_of_others() -> set[str]:
    """Ray's and vLLM's, by their names and by the last two parts of their paths."""
    found = set()
    for name in ("ray", "vllm"):
        for file in package(name).rglob("*.py"):
            found |= {file.name, f"{file.parent.name}/{file.name}"}
    return found


# --- links ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", documented.PAGES)
def test_links_lead_somewhere(page: str) -> None:
    def problems() -> Iterator[tuple[Found, str]]:
        for link in documented.links(page):
            if re.match(r"[a-z]+:", link.text):
                continue  # the web's
            path, _, anchor = link.text.partition("#")
            target = (REPO / page).parent / path if path else REPO / page
            if not target.exists():
                yield link, "there is no such file"
            elif anchor and target.suffix == ".md":
                where = str(target.resolve().relative_to(REPO.resolve()))
                if anchor not in documented.anchors(where):
                    yield link, f"{where} has no heading for #{anchor}"

    wrong(problems())


def test_a_heading_s_anchor_is_github_s() -> None:
    assert "1-the-cluster" in documented.anchors("docs/eks.md")
    assert "a-request-whose-replica-is-lost" in documented.anchors("docs/operations.md")


# --- options --------------------------------------------------------------------------------

OTHERS_OPTIONS = {
    "--set": "helm",
    "--force-conflicts": "kubectl",
    "--server-side": "kubectl",
    "--target": "docker build",
    "--http2": "curl",
    "--gpus": "docker run",
    "--shm-size": "docker run",
    "--pids-limit": "docker run",
    "--no-deps": "pip",
    "--extra-index-url": "pip",
    "--index-url": "pip",
}
"""Options of others that stand alone in a sentence."""


@cache
def our_options() -> set[str]:
    return {
        option
        for command in [cli, *cli.commands.values()]
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help", "-h"}


@cache
def engine_arguments() -> set[str]:
    """What `vllm serve` takes, also what is not a config's to set."""
    return {*engine_args.table(), *engine_args.OWNED, *engine_args.SERVER_ONLY}


def test_options_that_stand_alone_are_somebody_s() -> None:
    """Ours, or of a program that the same page calls with it."""
    wrong(
        (span, f"no command of ours has {option}; if it is of others, add it to OTHERS_OPTIONS")
        for page in PAGES
        for span in documented.spans(page)
        for option in re.findall(r"^(--?[a-z][\w-]*)", span.text)
        if option not in our_options() and option not in OTHERS_OPTIONS
        if option.removeprefix("--").replace("-", "_") not in engine_arguments()
        if not any(option in command.text for command in documented.commands(page))
    )


# --- the rules themselves -------------------------------------------------------------------


def test_what_does_not_exist_is_not_taken_for_a_setting() -> None:
    there = ("args.replicas", "resources.memory_gib", "engine.max_model_len", "args.engine",
             "autoscaling.target_load", "gateway.replicas", "ingress.scheme")  # fmt: skip
    gone = ("args.replica", "resources.memory_gb", "engine.max_model_length", "gateway.replica",
            "autoscaling.target", "ingress.timeout_s")  # fmt: skip
    assert [path for path in (*there, *gone) if fragments.is_setting(path)] == list(there)


def test_what_was_never_exported_is_no_metric() -> None:
    there = {"serve_app_gateway_requests_total", "vllm:num_requests_running",
             "vllm:time_to_first_token_seconds_bucket", "ray_vllm_kv_cache_usage_perc"}  # fmt: skip
    assert there <= metric_names()
    assert not {"serve_app_gateway_requests", "vllm:requests_running"} & metric_names()
