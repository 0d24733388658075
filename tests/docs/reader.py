"""A reader who types a page's commands one after the other, in a folder of his own.

What needs files is run for real, within this process; what needs Kubernetes, against the stand-in
API server of tests/kube, with its operator going on beside it.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from unittest import mock

import click
import pytest
import ways
import yaml
from harness import shell
from harness.documented import Command, Shown
from harness.manifests import CRD
from harness.processes import REPO
from kube_api import KubeAPI
from operator_model import Operator, running
from ways import NoWay, Way

from serve_app import cli
from serve_app.config.document import load
from serve_app.kuberay.live import follow, upgrade
from serve_app.kuberay.validate import manifests, schema
from serve_app.kuberay.validate.judge import judge
from serve_app.planner.check_model import refuse

_COPIED = ("configs", "kuberay", "requirements", "README.md", "docs", "Dockerfile", "Makefile",
           "pyproject.toml")  # fmt: skip
_LINKED = ("models", "serve_app", "tests", "benchmarks", "tools", ".venv")


def checkout(folder: Path) -> Path:
    """A clone of this repository as a reader has it, which commands may change."""
    folder.mkdir()
    for name in _COPIED:
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, folder / name)
        elif (REPO / name).exists():
            shutil.copy(REPO / name, folder / name)
    for name in _LINKED:
        if (REPO / name).exists():
            (folder / name).symlink_to(REPO / name)
    for name, text in ways.OWN_FILES.items():
        (folder / name).write_text(text)
    return folder


class Reader:
    """Types commands; remembers what was exported, and the files that were written."""

    def __init__(self, folder: Path) -> None:
        self.folder = checkout(folder)
        self.variables = dict(ways.OWN_VARIABLES)
        self._ended = contextlib.ExitStack()
        self._kube: KubeAPI | None = None

    def __enter__(self) -> Reader:
        self._patch = self._ended.enter_context(pytest.MonkeyPatch.context())
        self._patch.chdir(self.folder)
        self._patch.setenv("HF_HUB_OFFLINE", "1")  # the models that pages name are kept
        self._patch.setenv("COLUMNS", "200")
        self._patch.delenv("RAY_ADDRESS", raising=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.close()

    def types(self, command: Command) -> None:
        """Do what the command asks for, as far as :class:`ways.Way` goes.

        Raises:
            AssertionError: it does not work for a reader; the sentence says why.
        """
        if here := _HERE_DOCUMENT.fullmatch(command.text):
            self.writes(here[1], here[3])
            return
        text = ways.filled_in(command)
        whole = "…" not in text and "..." not in text
        text = re.sub(r"…|\.\.\.", "", text)
        listed = r"serve-app [a-z-]+(?: \| [a-z-]+)+"
        parts = text.split(" | ") if command.span and re.fullmatch(listed, text) else [text]
        if len(parts) > 1:
            whole, parts = False, [parts[0], *(f"serve-app {part}" for part in parts[1:])]
        for part in parts:
            unset = [] if command.span else self._unset(part)
            if unset:
                raise NoWay(f"${unset[0]} is set nowhere on this page before (see OWN_VARIABLES)")
            try:
                simple = shell.simple_commands(shell.expanded(part, self._value), ways.ANSWERS)
            except ValueError as error:
                raise NoWay(f"the shell cannot read it: {error}") from None
            for one in simple:
                self._do(one, command, whole=whole)

    def writes(self, name: str, text: str) -> None:
        """A file that the page shows."""
        if not name.startswith(("/", "~", "$")):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(text)

    def _value(self, name: str) -> str:
        return self.variables.get(name, name.lower())

    def _unset(self, text: str) -> list[str]:
        names: list[str] = []
        shell.expanded(text, lambda name: names.append(name) or "")
        return [name for name in names if name not in self.variables]

    def _do(self, one: shell.Simple, command: Command, *, whole: bool) -> None:
        if not one.words:
            self.variables |= dict(one.environment)
            return
        first = one.words[0].removeprefix(".venv/bin/").removeprefix("./.venv/bin/")
        words = self._globbed([first, *one.words[1:]])
        while words[0] in _BEFORE_PROGRAMS and len(words) > 1:
            whole = whole and words[0] != "xargs"  # which adds arguments
            words = words[1:]
            while len(words) > 1 and words[0].startswith("-"):
                words = words[1:]
        for option, word in pairwise(words):
            made = option in ("-o", "--output", "--save") or Path(word).exists()
            if word in ways.OWN_CONFIGS and not made:
                shutil.copy("configs/demo.yaml", word)
        # A name in a sentence, such as `serve-app deploy`, is not what a reader types.
        complete = whole and not (command.span and self._is_a_mention(words))
        way = ways.way_of(words, whole=complete)
        if not complete:
            return
        if way is Way.FILES:
            out = self._run(words, command)
            if one.output and not one.output.startswith(("/", "~")):
                Path(one.output).write_text(out)
        elif way is Way.KUBERNETES:
            self._on_kubernetes(words, command)
        elif way is Way.START:
            self._would_start(words)
        elif way is Way.MAKE:
            self._make(words)
        elif way is Way.SHELL:
            self._shell(words)
        elif way is Way.OTHER:
            self._of_others(words)

    @staticmethod
    def _is_a_mention(words: list[str]) -> bool:
        """Whether a sentence only names a command, without what it would work on."""
        if words[0] != "serve-app":
            return len(words) <= 2 and words[0] in ("serve", "ray")
        context = ways.parse_click(cli.cli, "serve-app", words[1:], whole=False)
        arguments = [p for p in context.command.params if isinstance(p, click.Argument)]
        given = [p for p in arguments if context.params.get(p.name or "")]
        return any(p.required and p not in given for p in arguments) or bool(
            arguments and not given and ways.way_of(words, whole=False) is Way.FILES
        )

    @staticmethod
    def _globbed(words: list[str]) -> list[str]:
        found: list[str] = []
        for word in words:
            matches = sorted(str(p) for p in Path().glob(word)) if "*" in word[1:] else []
            found += matches or [word]
        return found

    # --- ours ---

    def _run(self, words: list[str], command: Command, typed: str = "") -> str:
        """Run `serve-app` in this process; its output. The status is 0, or a documented one."""
        out, err = io.StringIO(), io.StringIO()
        person = io.StringIO(typed)
        person.isatty = lambda: bool(typed)  # type: ignore[method-assign]
        with (
            mock.patch.object(sys, "argv", words),
            mock.patch.object(sys, "stdin", person),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            cli.main()
        allowed = {0, *map(int, re.findall(r"exit status (\d)", command.comment))}
        if ended.value.code not in allowed:
            said = f"{out.getvalue()}{err.getvalue()}".strip().splitlines()[-12:]
            raise NoWay(f"exit status {ended.value.code}:\n" + "\n".join(said))
        return out.getvalue()

    def _would_start(self, words: list[str]) -> None:
        """What `serve-app run` does before it starts anything."""
        context = ways.parse_click(cli.cli, "serve-app", words[1:], whole=True)
        configs = [word for word in words[2:] if re.search(r"\.(ya?ml|json)$", word)]
        saved = str(context.params.get("save"))  # a config that is made for models
        for config in [c for c in configs if c != saved]:
            self._must_exist([config])
            fleet = load(config)
            if not context.params.get("no_check"):
                refuse(fleet)

    def _on_kubernetes(self, words: list[str], command: Command) -> None:
        context = ways.parse_click(cli.cli, "serve-app", words[1:], whole=True)
        kube, name = self._cluster(), ways.service_of(context)
        if name is not None:
            self._must_run(kube, name, revisions=2 if words[1] == "rollback" else 1)
        if words[1] == "logs":
            # Logs that are followed end when a reader has seen enough.
            words = [word for word in words if word not in ("--follow", "-f")]
            for pod in kube.all("pods"):
                for container in pod["spec"]["containers"]:
                    kube.logs[pod["metadata"]["name"], container["name"]] = ["a line"]
        self._edit_profile(context.params.get("profile_path"))
        self._type_to_kubernetes(words, command)

    def _type_to_kubernetes(self, words: list[str], command: Command) -> None:
        # By an option: the kubernetes package reads KUBECONFIG once, when it is imported.
        there = ["--kubeconfig", str(self.folder / "kubeconfig")]
        self._run([*words, *there], command, typed="y\n" if words[1] == "delete" else "")

    def _must_run(self, kube: KubeAPI, name: str, revisions: int) -> None:
        """The fleet that a command takes for granted, deployed so many times at least."""
        config = Path(f"configs/{name}.yaml")
        if not config.exists():
            raise NoWay(f"there is no {config} that would be called {name}")
        there = kube.get("rayservices", "serve-app", name)
        past = len(kube.all("controllerrevisions", "serve-app")) if there else 0
        Path("earlier").mkdir(exist_ok=True)
        for number in range(past, revisions):
            changed = yaml.safe_load(config.read_text())
            changed["applications"][0]["args"].setdefault("engine", {})["seed"] = number
            Path(f"earlier/{name}.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
            typed = ["serve-app", "deploy", f"earlier/{name}.yaml", "--force"]
            self._type_to_kubernetes(typed, Command("", "", 0))

    def _edit_profile(self, path: Path | None) -> None:
        """The reader has put in what a profile asks for."""
        if path is not None and path.exists() and "REPLACE_ME" in path.read_text():
            path.write_text(path.read_text().replace("REPLACE_ME", "123456789012"))

    def _cluster(self) -> KubeAPI:
        if self._kube is None:
            for setting, seconds in (("_SETTLE_S", 0.2), ("_FAILED_S", 3.0), ("_LOOK_S", 0.5)):
                self._patch.setattr(follow, setting, seconds)
            self._patch.setattr(upgrade, "_OPERATOR_S", 5.0)
            self._kube = kube = KubeAPI(schema.load_crd(CRD))
            self._ended.callback(kube.close)
            kube.store("namespaces", {"metadata": {"name": "serve-app"}})
            kube.kubeconfig(self.folder / "kubeconfig")
            self._ended.enter_context(running(Operator(kube)))
        return self._kube

    # --- of others ---

    def _make(self, words: list[str]) -> None:
        if said := _make_would_say(tuple(words[1:])):
            raise NoWay(said)

    def _shell(self, words: list[str]) -> None:
        match words:
            case ["export", *assignments]:
                for assignment in assignments:
                    name, _, value = assignment.partition("=")
                    self.variables[name] = value
            case ["cd", to] if not Path(to).is_dir() and not to.startswith("serve"):
                raise NoWay(f"there is no folder {to}")
            case ["cp" | "mv" | "mkdir" | "sed" | "touch", *arguments]:
                outside = [a for a in arguments if a.startswith(("/", "~"))]
                done = None if outside else subprocess.run(words, capture_output=True, text=True)
                if done is not None and done.returncode:
                    raise NoWay(done.stderr.strip())
            case ["cat" | "source" | "." | "less" | "tail" | "head", *arguments]:
                self._must_exist([a for a in arguments if _is_a_path(a)])

    def _of_others(self, words: list[str]) -> None:
        program, *arguments = words
        named = [
            value.removeprefix("@")
            for option, value in pairwise(arguments)
            if option in _FILE_OPTIONS.get(program, ())
        ]
        if program not in {"helm", "scp", *_RUN_OTHERS}:  # their words are paths elsewhere, or none
            named += [word for word in arguments if _is_a_path(word)]
        self._must_exist([n for n in named if n != "-" and "://" not in n])
        if program == "kubectl":
            self._judge(named)
        elif program in _RUN_OTHERS and "serve-app" in arguments:
            rest = arguments[arguments.index("serve-app") + 1 :]
            ways.parse_click(cli.cli, "serve-app", rest, whole=True)
        elif program in ("docker", "podman") and "--target" in arguments:
            target = arguments[arguments.index("--target") + 1]
            if not re.search(rf"^FROM .* AS {target}$", Path("Dockerfile").read_text(), re.M):
                raise NoWay(f"the Dockerfile has no target {target}")
        elif program.startswith("python"):
            self._python(arguments)

    def _must_exist(self, paths: list[str]) -> None:
        for path in paths:
            if not Path(path).exists():
                raise NoWay(f"there is no {path}, and no command before it makes it")

    def _judge(self, named: list[str]) -> None:
        """By our own rules, without those about other folders."""
        ours = [Path(n) for n in named if "://" not in n and n != "-"]
        documents = manifests.read(tuple(ours)) if ours else []
        errors = [f for f in judge(documents, None) if f.status == "fail"]
        if errors:
            raise NoWay("; ".join(f"{f.about}: {f.text}" for f in errors))

    def _python(self, arguments: list[str]) -> None:
        """A module or a script of ours exists, and has the options in its own source."""
        if arguments[:1] == ["-m"]:
            module = arguments[1].replace(".", "/")
            there = [REPO / f"{module}.py", REPO / module]
            sources = [path for path in there if path.exists()]
            if not sources and module.split("/")[0] in _LINKED:
                raise NoWay(f"there is no module {arguments[1]}")
        else:
            sources = [REPO / a for a in arguments[:1] if a.endswith(".py")]
        text = "".join(
            file.read_text()
            for source in sources
            for file in ([source] if source.is_file() else source.rglob("*.py"))
        )
        for option in arguments if sources else ():
            if option.startswith("--") and f'"{option.partition("=")[0]}"' not in text:
                raise NoWay(f"{' '.join(arguments[:2])} has no option {option}")


_HERE_DOCUMENT = re.compile(r"cat >>? ?(\S+) <<-?\s*['\"]?(\w+)['\"]?\n(.*\n)\2", re.DOTALL)
_BEFORE_PROGRAMS = {"xargs", "sudo", "nohup", "watch", "env"}
_RUN_OTHERS = {"docker", "podman", "uv", "uvx", "ssh"}
_FILE_OPTIONS = {
    "kubectl": ("-f", "-k", "--filename", "--kustomize"),
    "helm": ("-f", "--values"),
    "docker": ("--env-file",),
    "pip": ("-r", "--requirement", "-c"),
    "uv": ("-r", "--requirement", "-c"),
}
_MADE_ELSEWHERE = re.compile(r"results/|/path/to/|~|https?:|s3:|dist/|@http")


@cache
def _make_would_say(arguments: tuple[str, ...]) -> str:
    """The error of ``make -n``; empty where all is well. PYTHON saves it a search each time."""
    make = ["make", "-n", f"PYTHON={sys.executable}", *arguments]
    done = subprocess.run(make, cwd=REPO, capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


def _is_a_path(word: str) -> bool:
    """Whether a word names a file of this repository, or one that a command before has made."""
    if word.startswith(("-", "/", "$")) or _MADE_ELSEWHERE.match(word) or "=" in word:
        return False
    return bool(re.search(r"\.(ya?ml|py|txt|lock|sh|json|toml)$", word))


def problems(page: Sequence[Command | Shown], reader: Reader) -> Iterator[str]:
    """One paragraph for each command of a page that does not work."""
    for one in page:
        if isinstance(one, Shown):
            reader.writes(one.file, one.text)
            continue
        try:
            reader.types(one)
        except Exception as error:
            kind = "" if isinstance(error, NoWay) else f"{type(error).__name__}: "
            yield f"{one.where}: {one.text}\n    {kind}{error}"
