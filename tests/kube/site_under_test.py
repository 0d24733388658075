"""Where the day-two tests run: against the stand-in, or on the cluster that an option names.

A test knows the cluster by what an API server tells, and changes it by the commands under test.
What only one of the two can do is an attribute or a method here.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from controllers import Refused, evict
from harness.manifests import ROOT
from operator_model import Operator

from serve_app.cli import cli
from serve_app.errors import UserError
from serve_app.kuberay.live import state
from serve_app.kuberay.live.api_server import APIServer
from serve_app.kuberay.live.target import Target

Document = dict[str, Any]

NAME = "daytwo"
"""The fleet of these tests."""


@dataclass(frozen=True)
class Said:
    """What a command printed, with the sentence of its error, and its exit status."""

    text: str
    code: int

    @property
    def change(self) -> str:
        """What deploy, diff or rollback said of the change, on its first line."""
        return next(
            line.partition("this ")[2] for line in self.text.splitlines() if "this " in line
        )


@dataclass
class Site:
    """A cluster with KubeRay, and a namespace that is this run's alone."""

    server: APIServer
    namespace: str
    options: list[str]
    """Options of every command that talks to the cluster."""

    folder: Path
    gpus: bool
    """Whether the fleet is the 70B on (faked) GPUs, or a small model on CPUs."""

    image: str
    timeout_s: float
    operator: Operator | None = None
    """The stand-in's; None on a real cluster."""

    profile: Document = field(default_factory=dict)
    """What the profile has beside namespace and image."""

    # --- the fleet ---

    def fleet(self) -> Document:
        """A config that comes up, to be changed by a test."""
        config: Document = yaml.safe_load((ROOT / "configs/llama70b.yaml").read_text())
        if not self.gpus:
            model, _ = config["applications"]
            model["args"] = {
                "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
                "resources": {"device": "cpu", "num_cpus": 1},
                "engine": {"max_model_len": 1024, "max_num_seqs": 64, "enforce_eager": True},
                "autoscaling": {"min_replicas": 1, "max_replicas": 2},
            }
        return config

    @property
    def model(self) -> str:
        return str(self.fleet()["applications"][0]["name"])

    def another(self, config: Document, name: str) -> Document:
        """One more model; on GPUs of another shape of pod."""
        config = copy.deepcopy(config)
        more = copy.deepcopy(config["applications"][0])
        more["name"] = name
        if self.gpus:
            resources = {"accelerator_type": "L40S"}
            more["args"] = {"model": "org/small", "resources": resources}
        config["applications"].insert(1, more)
        return config

    # --- commands ---

    def run(self, command: str, *args: str) -> Said:
        result = CliRunner().invoke(cli.commands[command], [*args, *self.options])
        if isinstance(result.exception, UserError):
            return Said(f"{result.output}{result.exception}", 2)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Said(result.output, result.exit_code)

    def deploy(self, config: Document, *args: str, **profile: Any) -> Said:
        """``profile`` adds to the profile."""
        timeout = ["--timeout", str(self.timeout_s)]
        return self.run("deploy", *self._files(config, profile), *timeout, *args)

    def diff(self, config: Document, **profile: Any) -> Said:
        return self.run("diff", *self._files(config, profile))

    def on_fleet(self, command: str, *args: str) -> Said:
        """A command that takes the RayService's name."""
        return self.run(command, NAME, "--namespace", self.namespace, *args)

    def _files(self, config: Document, profile: Document) -> list[str]:
        path, where = self.folder / f"{NAME}.yaml", self.folder / "profile.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        mine = {"namespace": self.namespace, "image": self.image, "ingress": {"kind": "none"}}
        where.write_text(yaml.safe_dump({**mine, **self.profile, **profile}))
        return [str(path), "--cluster", str(where)]

    # --- what is there ---

    @property
    def target(self) -> Target:
        return Target(self.server, NAME, self.namespace)

    def service(self) -> Document:
        return self.target.require()

    def state(self) -> state.State:
        return state.of(self.service())

    def cluster(self) -> Document:
        """The RayCluster that serves; the one that starts while none does."""
        name = self.state().active or self.state().pending
        return next(c for c in self.target.clusters() if c["metadata"]["name"] == name)

    def group(self, name: str) -> Document:
        """A worker group of :meth:`cluster`."""
        groups = self.cluster()["spec"]["workerGroupSpecs"]
        return next(g for g in groups if g["groupName"] == name)

    @property
    def workers(self) -> str:
        """The name of the first model's worker group."""
        return "h100-x4" if self.gpus else "cpu"

    def pods(self, group: str) -> list[str]:
        """Names of a group's pods that are Ready and not going, in every cluster."""
        return sorted(
            pod["metadata"]["name"]
            for pod in self.target.pods()
            if pod["metadata"]["labels"].get("ray.io/group") == group
            and "deletionTimestamp" not in pod["metadata"]
            and any(
                c["type"] == "Ready" and c["status"] == "True"
                for c in (pod.get("status") or {}).get("conditions") or []
            )
        )

    def names(self, kind: str) -> set[str]:
        return {o["metadata"]["name"] for o in self.server.list(kind, self.namespace)}

    def wait(self, what: str, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + self.timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {self.timeout_s:.0f} s: {what}"
            time.sleep(0.2)

    # --- what others do ---

    def patch(self, plural: str, name: str, change: Document | list[Document]) -> None:
        """Somebody else changes an object of ray.io, not by server-side apply."""
        form = "json" if isinstance(change, list) else "merge"
        status, text = self.server._send(
            "PATCH",
            f"/apis/ray.io/v1/namespaces/{self.namespace}/{plural}/{name}",
            {"fieldManager": "somebody"},
            json.dumps(change),
            f"application/{form}-patch+json",
        )
        assert status == 200, text

    def evict(self, pod: str) -> bool:
        """As a drain does; False where a budget forbids it now."""
        if self.operator is not None:
            try:
                evict(self.operator.api, self.namespace, pod)
            except Refused as refused:
                assert refused.args[0] == 429, refused
                return False
            return True
        status, text = self.server._send(
            "POST",
            f"/api/v1/namespaces/{self.namespace}/pods/{pod}/eviction",
            {},
            json.dumps(
                {
                    "apiVersion": "policy/v1",
                    "kind": "Eviction",
                    "metadata": {"name": pod, "namespace": self.namespace},
                }
            ),
            "application/json",
        )
        assert status in (200, 201, 429), text
        return status != 429

    @contextmanager
    def without_room(self) -> Iterator[Document]:
        """While it holds, pods that start find no machine by this addition to the profile."""
        if self.operator is None:
            yield {"zones": ["none-such-1a"]}
            return
        self.operator.machines.gpus = 0
        yield {"zones": ["none-such-1a"]}
        self.operator.machines.gpus = None

    def needs(self, what: bool, reason: str) -> None:
        if not what:
            pytest.skip(f"on this cluster: {reason}")
