"""How each command of the documentation is tested. :func:`way_of` is the rule.

A command that no rule takes is a failure, which says what to do: mostly a line in a table here.
"""

from __future__ import annotations

import re
from enum import Enum

import click
from harness.documented import Command
from harness.processes import REPO

from serve_app.cli import cli


class Way(Enum):
    FILES = "run: it needs nothing but files"
    KUBERNETES = "run against the stand-in API server"
    SERVER = "run beside a running server, by test_at_a_server.py; its words are parsed"
    START = "its config is loaded and judged as it would be before a start"
    PARSED = "its words are parsed, and its files exist"
    MAKE = "make -n says what it would do"
    SHELL = "the shell's own, or of every Unix"
    OTHER = "a program of others: the files that it names exist"


class NoWay(AssertionError):
    """No rule says how to test a command, or a rule says that it cannot work."""


# --- what a reader fills in -----------------------------------------------------------------

PLACEHOLDERS = {
    "CONFIG": "configs/demo.yaml",
    "MODEL": "smollm2-135m",
    "NAME": "llama70b",
    "FILE": "model_list.yaml",
    "FLEET": "llama70b",
    "DIR": "out",
    "N": "1",
    "PORT": "8000",
    "TARGET": "test",
    "KEY=VALUE": "max_model_len=1024",
    "key=value": "max_model_len=1024",
}
"""What a word in a command stands for. In every command it has the same meaning."""

FOR_A_CLUSTER = "configs/llama70b.yaml"
"""What ``CONFIG`` stands for where it goes to a cluster."""

HUB_MODEL = "Qwen/Qwen3-32B"
"""What ``MODEL`` stands for where a model is not deployed yet; its metadata is kept."""

OWN_VARIABLES = {
    "HOME": "/root", "USER": "me", "PATH": "/usr/bin", "PWD": ".", "HF_TOKEN": "hf_secret",
    "VALKEY_PASSWORD": "secret", "HOST": "127.0.0.1",
}  # fmt: skip
"""Variables that a reader has, or knows what to set to; all others are set on the page first."""

ANSWERS = {
    "aws sts get-caller-identity --query Account --output text": "123456789012",
    "kubectl get crd rayservices.ray.io -o yaml": "tests/kube/data/rayservice-v1-crd.schema.json",
    "": "answer",
}
"""What a command within ``$(…)`` or ``<(…)`` prints; "" is for all others."""

OWN_FILES = {
    "model_list.yaml": """model_list:
- model_name: llama
  litellm_params: {model: hosted_vllm/meta-llama/Llama-3.1-8B-Instruct}
""",
    "profile.yaml": "image: example.com/serve-app:0.1.0\n",
    "my-prices.yaml": "p5.48xlarge: 55.04\ng6e.12xlarge: 10.49\n",
}
"""Files that a reader has written."""

OWN_CONFIGS = {"fleet.yaml", "config.yaml"}
"""Names for a reader's own config, which is as configs/demo.yaml where no command has made it."""


def filled_in(command: Command) -> str:
    """The command with its placeholders replaced; alternatives become the first of them."""
    text = command.text
    if command.span:
        text = re.sub(r"\[([^\[\]]*)\]…?", r"\1", text)  # what may be left out is there
        text = re.sub(r"(?<=\w)…", "", text)  # several are one
        text = re.sub(r"\b([\w.-]+)(?:\|[\w.-]+)+", r"\1", text)
    text = re.sub(r"<([a-z][\w -]*)>", lambda m: m[1].upper().replace(" ", "_"), text)
    meant = dict(PLACEHOLDERS)
    if re.match(r"serve-app (plan|run|fetch)\b", text):
        meant["MODEL"] = HUB_MODEL
    elif re.match(r"serve-app (render|diff|deploy)\b", text):
        meant["CONFIG"] = FOR_A_CLUSTER
    for name, value in meant.items():
        text = re.sub(rf"(?<![\w$/=-]){re.escape(name)}(?![\w=/-])", value, text)
    return text


# --- ours -----------------------------------------------------------------------------------

_FILES = {"keys", "plan", "check", "render", "validate", "convert", "completion", "fetch"}
_AT_A_SERVER = {"status", "logs", "reload", "stop", "admin", "chat", "env"}
_RAY_AT_A_SERVER = {("serve", "status"), ("serve", "config"), ("ray", "status")}

_PARSED = {
    "clean-processes": "it would end processes; tests/slow/test_life_and_death.py runs it",
    "fetch": "models other than the demo's come from the hub; tests/setup runs it against one",
}
"""Commands of ours that are not run, with the reason."""


def parse_click(
    group: click.Group, program: str, words: list[str], *, whole: bool
) -> click.Context:
    """The context that click makes of a command line; it does not run it.

    ``whole=False`` allows that arguments and options are left out.

    Raises:
        NoWay: click refuses it: there is no such command or option, or one is missing.
    """
    command: click.Command = group
    context = click.Context(command, info_name=program)
    rest = words
    while isinstance(command, click.Group):
        name, *rest = rest or [""]
        if name.startswith("-") or not name:
            try:
                return command.make_context(program, [name, *rest] if name else [])
            except click.exceptions.Exit:
                return context
            except click.UsageError as error:
                if whole or name:
                    raise NoWay(f"`{program}`: {error.format_message()}") from None
                return context
        found = command.get_command(context, name)
        if found is None:
            raise NoWay(f"`{program}` has no command `{name}`")
        context, command, program = click.Context(found, context), found, f"{program} {name}"
    try:
        return command.make_context(program, list(rest), parent=context.parent)
    except click.exceptions.Exit:
        return context
    except click.MissingParameter as error:
        if whole:
            raise NoWay(f"`{program}`: {error.format_message()}") from None
        return context
    except click.ClickException as error:
        raise NoWay(f"`{program}`: {error.format_message()}") from None


def service_of(context: click.Context) -> str | None:
    """The RayService that a command names: a fleet of ours is called as its config's file.

    `serve-app logs` takes a model of this machine's server in the same place.
    """
    if "names" not in context.params:
        return context.params.get("name")
    first = next(iter(context.params["names"]), None)
    return first if first and (REPO / f"configs/{first}.yaml").exists() else None


def _way_of_ours(words: list[str], *, whole: bool) -> Way:
    context = parse_click(cli, "serve-app", words[1:], whole=whole)
    name = next((word for word in words[1:] if not word.startswith("-")), None)
    if name is None or not context.params:
        return Way.FILES if name is None or "--help" in words else Way.PARSED
    if "kubeconfig" in context.params and (name not in _AT_A_SERVER or service_of(context)):
        return Way.KUBERNETES
    if name in _AT_A_SERVER or context.params.get("ask_cluster"):
        return Way.SERVER
    if name == "run":
        return Way.START
    if name in _PARSED and words[1:] != ["fetch", "demo"]:
        return Way.PARSED
    if name in _FILES:
        return Way.FILES
    raise NoWay(
        f"`serve-app {name}` is new: say in tests/docs/ways.py whether it needs files (_FILES), "
        "a running server (_AT_A_SERVER), or cannot be run by a test (_PARSED)"
    )


# --- all programs ---------------------------------------------------------------------------

OTHERS = {
    "kubectl": "a cluster's; the manifests that it applies are judged by `validate`",
    "helm": "a cluster's; tests/kube/test_guide.py merges our values",
    "eksctl": "AWS'",
    "aws": "AWS'",
    "docker": "builds and runs the image: make test-image",
    "podman": "as docker",
    "apt-get": "the system's",
    "apt": "the system's",
    "sudo": "the system's",
    "git": "fetches this repository",
    "gh": "GitHub's",
    "pip": "installs; tests/setup installs the wheel",
    "pip3": "as pip",
    "uv": "as pip",
    "uvx": "as pip",
    "npm": "installs what talks to us",
    "npx": "as npm",
    "claude": "Claude Code, a client",
    "litellm": "a proxy in front of us",
    "open-webui": "a client",
    "vllm": "bare vLLM, which needs a GPU or a minute; benchmarks run it",
    "promtool": "Prometheus'",
    "nvidia-smi": "needs a GPU",
    "py-spy": "needs a process",
    "wrk": "needs a server",
    "ssh": "needs another machine",
    "scp": "as ssh",
    "openssl": "makes up a key",
    "base64": "the system's",
    "http": "httpie, as curl",
    "wget": "as curl",
    "serve-app-haproxy": "Serve starts it",
    "brew": "the system's",
    "systemctl": "the system's",
    "journalctl": "the system's",
    "asciinema": "recorded the terminal",
}
"""Programs that are not ours and are not run, with the reason."""

SHELL = {
    "export", "cd", "cp", "mv", "mkdir", "sed", "cat", "echo", "printf", "source", ".", "eval",
    "unset", "set", "grep", "head", "tail", "sort", "jq", "xargs", "tee", "less", "watch", "sleep",
    "which", "ls", "rm", "kill", "pkill", "dmesg", "ulimit", "for", "done", "fi", "true", "nohup",
    "df", "free", "nproc", "lsof", "ss", "ps", "tr", "wc", "cut", "awk", "touch", "chmod", "column",
    "diff", "exit", "ln", "uname", "id", "date", "install", "python -m json.tool",
}  # fmt: skip

LOCAL = re.compile(r"(?:127\.0\.0\.1|\blocalhost|(?<!\S)):8000\b")
"""An address of this machine's server, as the documentation writes it."""


def way_of(words: list[str], *, whole: bool) -> Way:
    """The way in which a simple command is tested, with its words as far as they are ours checked.

    Raises:
        NoWay: no rule takes it, or it cannot work.
    """
    program = words[0]
    if program == "serve-app":
        return _way_of_ours(words, whole=whole)
    if program in ("ray", "serve"):
        return _way_of_rays(words, whole=whole)
    if program == "make":
        return Way.MAKE
    if program == "curl":
        return Way.SERVER if whole and LOCAL.search(" ".join(words)) else Way.OTHER
    if program in OTHERS or re.fullmatch(r"python[\d.]*", program):
        return Way.OTHER
    if program in SHELL:
        return Way.SHELL
    raise NoWay(
        f"no rule of tests/docs/ways.py takes `{program}`: if it is a program of others, add it to "
        "OTHERS with the reason why it is not run"
    )


def _way_of_rays(words: list[str], *, whole: bool) -> Way:
    """By Ray's own parsers. They take seconds to import."""
    from ray.scripts.scripts import cli as ray
    from ray.serve.scripts import cli as serve

    parse_click(ray if words[0] == "ray" else serve, words[0], words[1:], whole=whole)
    return Way.SERVER if tuple(words[:2]) in _RAY_AT_A_SERVER else Way.PARSED
