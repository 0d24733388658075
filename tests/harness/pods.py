"""Pods of a rendered RayService as containers: what the kubelet and KubeRay make of them.

Each has an address of its own, a root file system that nobody can write to, and of everything
else what the manifest says: user, capabilities, environment, volumes, hooks. KubeRay's part
(commands, variables, probes) is that of version 1.7, in ray-operator/controllers/ray/common/pod.go.
"""

from __future__ import annotations

import json
import secrets
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness.container_engine import Engine
from harness.processes import eventually

SERVE_PORT = 8000
AGENT_PORT = 52365
_WGET = "wget --tries 1 -T {seconds} -q -O- http://localhost:{port}/{path} | grep success"
"""KubeRay's command for a probe."""

READY_WITH_PROXY = " && ".join(
    (
        _WGET.format(seconds=2, port=AGENT_PORT, path="api/local_raylet_healthz"),
        _WGET.format(seconds=10, port=SERVE_PORT, path="-/healthz"),
    )
)
"""KubeRay's readiness probe of a worker that has none of its own."""

_WAIT_GCS_READY = """
SECONDS=0
until ray health-check --address {head}:6379; do
  (( SECONDS <= 120 )) || exit 1
  sleep 5
done
"""
"""What KubeRay's init container of a worker does; there it waits for ever."""

_ASK = """
import sys, urllib.error, urllib.request
method, url, body, token = sys.argv[1:]
headers = {"content-type": "application/json", "x-ray-authorization": f"Bearer {token}"}
request = urllib.request.Request(url, body.encode() or None, headers, method=method)
try:
    answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30)
except urllib.error.HTTPError as error:
    answer = error
print(answer.status, answer.read().decode(), end="")
"""
"""A request, in the image's Python: the pods' network need not be reached from this machine."""


@dataclass(frozen=True)
class Pod:
    """A container that runs Ray."""

    engine: Engine
    id: str
    container: dict[str, Any]
    """Of the manifest."""

    @property
    def address(self) -> str:
        found = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        return self.engine("inspect", "--format", found, self.id).strip()

    def execute(self, *command: str, timeout: float = 60) -> str:
        """What a command in it prints, as its own user; fails where the command does."""
        return self.engine("exec", self.id, *command, timeout=timeout)

    def logs(self) -> str:
        """What its main process said last."""
        done = self.engine.attempt("logs", "--tail", "50", self.id)
        return done.stdout + done.stderr

    def is_ready(self) -> bool:
        """What the rendered readiness probe says, or else KubeRay's."""
        probe = self.container.get("readinessProbe", {}).get("httpGet")
        if probe is None and self.container["name"] == "ray-worker":
            command = ("bash", "-c", READY_WITH_PROXY)
            return self.engine.attempt("exec", self.id, *command).returncode == 0
        return self.joined() if probe is None else self._gets(probe["port"], probe["path"])

    def joined(self) -> bool:
        """What KubeRay's liveness probe says: Ray's node is up."""
        return self._gets(AGENT_PORT, "/api/healthz")

    def _gets(self, port: int, path: str) -> bool:
        return self.ask("GET", f"http://{self.address}:{port}{path}")[0] == 200

    def ask(self, method: str, url: str, body: Any = None, token: str = "") -> tuple[int, str]:
        """Status and body of an answer to a request that comes from this pod; 0 without one."""
        sent = "" if body is None else json.dumps(body)
        done = self.engine.attempt("exec", self.id, "python", "-c", _ASK, method, url, sent, token)
        status, _, answer = done.stdout.partition(" ")
        return int(status or 0), answer or done.stderr

    def drain(self, timeout: float) -> str:
        """What the rendered preStop hook prints."""
        return self.execute(
            *self.container["lifecycle"]["preStop"]["exec"]["command"], timeout=timeout
        )


@dataclass
class Cluster:
    """The pods of one RayService. ``models`` are the folders in the volume of the models."""

    engine: Engine
    image: str
    service: dict[str, Any]
    folder: Path
    models: dict[str, Path]
    pods: list[Pod] = field(default_factory=list)
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    network: str = field(default_factory=lambda: f"image-test-{secrets.token_hex(4)}")
    _guard: subprocess.Popen[bytes] = field(init=False)

    def __enter__(self) -> Cluster:
        self.engine("network", "create", "--internal", self.network)
        self._guard = self.engine.guard(self.network)
        return self

    def __exit__(self, *_: object) -> None:
        self._guard.communicate()
        assert self._guard.returncode == 0, f"the network {self.network} is still there"

    @property
    def head(self) -> Pod:
        return self.pods[0]

    def gateway(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """Status and body of an answer of the first gateway to a request that the head sends."""
        return self.head.ask(method, f"http://{self.pods[1].address}:{SERVE_PORT}{path}", body)

    def logs(self) -> str:
        return "\n".join(pod.logs() for pod in self.pods)

    def start_head(self) -> None:
        """Returns when it is ready: Ray gives a worker half a minute to join."""
        group = self.service["spec"]["rayClusterConfig"]["headGroupSpec"]
        head = self._start(group, "ray start --head", {"RAY_ADDRESS": "127.0.0.1:6379"})
        assert eventually(head.is_ready, 180, 2), head.logs()

    def start_worker(self, group_name: str) -> Pod:
        """Ray may still be starting in it."""
        groups = self.service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        group = next(g for g in groups if g["groupName"] == group_name)
        address = f"{self.head.address}:6379"
        wait = _WAIT_GCS_READY.format(head=self.head.address)
        self.engine.run(
            *self._arguments(group, {}), self.image, "/bin/bash", "-c", "--", wait, timeout=200
        )
        labels = ",".join(f"{key}={value}" for key, value in group["labels"].items())
        cpus = group["resources"]["CPU"]
        command = f"ray start --address={address} --labels={labels} --num-cpus={cpus}"
        return self._start(group, command, {"RAY_ADDRESS": address})

    def deploy(self) -> None:
        """Give the head the Serve config, as the operator does."""
        url = f"http://{self.head.address}:8265/api/serve/applications/"
        config = yaml.safe_load(self.service["spec"]["serveConfigV2"])
        assert eventually(lambda: self.head.ask("PUT", url, config, self.token)[0] == 200, 120, 2)

    def _start(self, group: dict[str, Any], command: str, env: dict[str, str]) -> Pod:
        parameters = group["rayStartParams"] | {
            "metrics-export-port": "8080",
            "dashboard-agent-listen-port": str(AGENT_PORT),
        }
        options = " ".join(f"--{name}={value}" for name, value in parameters.items())
        command = f"ulimit -n 65536; {command} --block {options}"
        container = group["template"]["spec"]["containers"][0]
        arguments = ["--restart", "on-failure", *self._arguments(group, env), self.image]
        started = self.engine.start(*arguments, "/bin/bash", "-c", "--", command)
        self.pods.append(Pod(self.engine, started, container))
        return self.pods[-1]

    def _arguments(self, group: dict[str, Any], env: dict[str, str]) -> list[str]:
        spec = group["template"]["spec"]
        container = spec["containers"][0]
        user = spec["securityContext"]
        limits = container["securityContext"]
        assert not limits["allowPrivilegeEscalation"] and limits["capabilities"]["drop"] == ["ALL"]
        assert limits["readOnlyRootFilesystem"]
        arguments = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
        arguments += ["--user", f"{user['runAsUser']}:{user['runAsGroup']}"]
        arguments += ["--network", self.network, "--no-healthcheck"]
        if self.engine.name == "podman":
            arguments += ["--read-only-tmpfs=false"]  # it would make /tmp and /run writable
        variables = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_SERVE_KV_TIMEOUT_S": "5",
            "RAY_CLUSTER_NAME": "image-test",  # by which models wait for pods that still come
            "RAY_CLUSTER_NAMESPACE": "serve-app",
            **env,
            **{variable["name"]: variable.get("value", "") for variable in container["env"]},
        }
        for name, value in variables.items():
            arguments += ["--env", f"{name}={value}"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for mount in container["volumeMounts"]:
            arguments += self._mount(volumes[mount["name"]], mount["mountPath"])
        return arguments

    def _mount(self, volume: dict[str, Any], path: str) -> list[str]:
        directory = volume.get("emptyDir", {})
        if directory.get("medium") == "Memory":
            size = directory["sizeLimit"].removesuffix("i").lower()
            return ["--tmpfs", f"{path}:rw,exec,mode=1777,size={size}"]
        folder = self.folder / f"{volume['name']}-{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        folder.chmod(0o777)  # as the kubelet makes it
        arguments = ["--volume", f"{folder}:{path}"]
        if "persistentVolumeClaim" in volume:
            for name, model in self.models.items():
                arguments += ["--volume", f"{model}:{path}/{name}:ro"]
        return arguments
