"""The two real servers that tests talk to: a Serve cluster with our config, and bare vLLM."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from harness import processes
from harness.processes import REPO
from serve_app import addresses
from serve_app.cluster import haproxy
from serve_app.config import engine_args
from serve_app.config.document import DEPLOYMENT
from serve_app.config.environment import environment
from serve_app.config.settings import ModelConfig
from serve_app.local.instance import Instance
from serve_app.local.orphans import orphans

Proxy = Literal["python", "haproxy"]

CHAT = "smollm2:135m.instruct"
CHAT_ALIASES = ("HuggingFaceTB/SmolLM2-135M-Instruct", "team/chat:v1.5")
EMBED = "minilm.l6:v2"
EMBED_ALIASES = ("sentence-transformers/all-MiniLM-L6-v2",)
MAX_BODY_MIB = 8

BIN = Path(sys.executable).parent
"""Where the commands of this environment are."""


def application(name: str, **args: Any) -> dict[str, Any]:
    """A model's block in a config."""
    return {
        "name": name,
        "route_prefix": None,
        "import_path": "serve_app.model:app",
        "args": {"resources": {"device": "cpu", "num_cpus": 0}, **args},
    }


def demo_args(name: str) -> dict[str, Any]:
    """``args`` of a model of configs/demo.yaml: the tests serve what the demo serves."""
    demo = yaml.safe_load((REPO / "configs/demo.yaml").read_text())
    args: dict[str, Any] = next(a["args"] for a in demo["applications"] if a["name"] == name)
    return args | {"resources": {"device": "cpu", "num_cpus": 0}}


def chat_application() -> dict[str, Any]:
    ours = {
        "served_as": list(CHAT_ALIASES),
        "frontends": 2,
        "env": {"VLLM_ENABLE_RESPONSES_API_STORE": "1"},
    }
    return application(CHAT, **demo_args("smollm2-135m") | ours)


def embed_application() -> dict[str, Any]:
    return application(EMBED, **demo_args("all-minilm-l6-v2") | {"served_as": list(EMBED_ALIASES)})


def document(
    port: int, *models: dict[str, Any], gateways: int | Literal["auto"] = 1
) -> dict[str, Any]:
    """A config with these models and a gateway."""
    gateway = {
        "name": "gateway",
        "route_prefix": "/",
        "import_path": "serve_app.gateway:app",
        "args": {"replicas": gateways, "num_cpus": 0, "max_body_mib": MAX_BODY_MIB},
    }
    return {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [*models, gateway],
    }


def as_yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False)


@contextmanager
def running(config: dict[str, Any], folder: Path, proxy: Proxy) -> Iterator[Cluster]:
    """A ready cluster, with this process as a driver of its Ray; nothing of it is left after."""
    cluster = Cluster.start(config, folder, proxy)
    try:
        cluster.wait_until_ready()
        with cluster.ray():
            yield cluster
    finally:
        left = cluster.interrupt()
    assert not left, f"Ctrl-C left {left}"


class Cluster:
    """A running `serve run`, and what a test wants to know of it."""

    def __init__(
        self,
        proxy: Proxy,
        instance: Instance,
        port: int,
        process: subprocess.Popen[bytes],
        log: Path,
        config: Path,
    ) -> None:
        self.proxy = proxy
        self._instance = instance
        self.port = port
        self.process = process
        self.log = log
        self.config = self.running = config
        self.orphans_before = orphans()
        self.base_url = f"http://127.0.0.1:{port}"
        self.phases: dict[str, list[str]] = {}
        """What GET /ready said that each model was doing, while :meth:`wait_until_ready` asked."""

    @classmethod
    def start(cls, config: dict[str, Any], folder: Path, proxy: Proxy) -> Cluster:
        """`serve run` with ``config``; :meth:`wait_until_ready` comes next."""
        path = folder / "config.yaml"
        path.write_text(as_yaml(config))
        log = folder / "serve.log"
        port = config["http_options"]["port"]
        instance = Instance(port)
        env = {
            # Folders and ports that no other cluster on this machine has.
            **instance.environment(),
            "RAY_SERVE_ENABLE_HA_PROXY": "1" if proxy == "haproxy" else "0",
            # Ray holds back what a second replica says until anything else is said.
            "RAY_DEDUP_LOGS": "0",
            **haproxy.environment(),
        }
        # Never somebody else's Ray, whose models it would replace.
        command = [*instance.serve(), "run", str(path), "--address", "local"]
        process = processes.start(command, log, **env)
        return cls(proxy, instance, port, process, log, path)

    def wait_until_ready(self, within_s: float = 300.0) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, f"serve run ended:\n{self.tail()}"
            status, report = self.ready()
            for name, model in report.get("models", {}).items():
                self.phases.setdefault(name, []).extend(s["phase"] for s in model["starting"])
            return status == 200

        assert processes.eventually(ready, within_s, 0.5), f"not ready:\n{self.tail()}"

    def ready(self) -> tuple[int, dict[str, Any]]:
        """Status and body of GET /ready; (0, {}) while nothing of ours answers."""
        try:
            answer = httpx.get(f"{self.base_url}/ready", timeout=10)
            return answer.status_code, answer.json()
        except (httpx.HTTPError, ValueError):
            return 0, {}

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def interrupt(self) -> dict[int, str]:
        """Ctrl-C; what is left of the session afterwards."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=120)
        finally:
            left = self.left()
            processes.kill_session(self.process.pid)
            self._instance.close(keep=False)
        return left

    def left(self, within_s: float = 15.0) -> dict[int, str]:
        """What is still there of an ended cluster, once it had some time."""
        processes.eventually(lambda: not processes.in_session(self.process.pid), within_s)
        others = {o.pid: o.name for o in orphans() if o not in self.orphans_before}
        return processes.in_session(self.process.pid) | others

    @property
    def gcs_address(self) -> str:
        for title in processes.in_session(self.process.pid).values():
            if found := re.search(r"/raylet .*--gcs-address=(\S+)", title):
                return found[1]
        raise AssertionError(f"no raylet in the session:\n{self.tail()}")

    @property
    def dashboard(self) -> str:
        """Where `serve deploy` sends a config."""
        found = re.search(r"View the dashboard at \S*?(http://[^\s\x1b]+)", self.log.read_text())
        assert found, self.tail()
        return found[1]

    def deployed(self) -> dict[str, Any]:
        """A copy of the config that runs."""
        return dict(yaml.safe_load(self.running.read_text()))

    def deploy(self, config: dict[str, Any]) -> None:
        """`serve deploy`, as a user would."""
        self.running = path = self.config.with_name("deployed.yaml")
        path.write_text(as_yaml(config))
        run = subprocess.run(
            [BIN / "serve", "deploy", str(path), "--address", self.dashboard],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert run.returncode == 0, run.stdout + run.stderr

    def applications(self) -> dict[str, Any]:
        """What `serve status` shows, as Serve's REST API reports it."""
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        return dict(ServeSubmissionClient(self.dashboard).get_serve_details()["applications"])

    def replicas(self, name: str, *states: str, deployment: str = DEPLOYMENT) -> dict[str, int]:
        """Pids by id of a model's running replicas, or of those in other states."""
        deployments = self.applications().get(name, {}).get("deployments", {})
        listed = deployments.get(deployment, {}).get("replicas", ())
        wanted = states or ("RUNNING",)
        return {r["replica_id"]: r.get("pid", 0) for r in listed if r["state"] in wanted}

    @contextmanager
    def ray(self) -> Iterator[None]:
        """This process as a driver of the cluster."""
        import ray

        ray.init(address=self.gcs_address, namespace="serve", log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()


class ModelPort:
    """A replica's own HTTP port, with the credential that opens it."""

    def __init__(self, base_url: str, credential: str) -> None:
        self.base_url = base_url
        self.credential = credential

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Ask as the gateway would."""
        headers = {"x-serve-app-credential": self.credential}
        return httpx.post(f"{self.base_url}{path}", json=body, headers=headers, timeout=180)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples on the replica's /metrics."""
        answer = httpx.get(
            f"{self.base_url}/metrics", headers={"x-serve-app-credential": self.credential}
        )
        answer.raise_for_status()
        return sum(
            sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


def front_ends(name: str) -> list[dict[str, ModelPort]]:
    """The ports of each of a model's replicas, by front end; needs :meth:`Cluster.ray`."""
    import ray
    from ray.serve._private.common import DeploymentID
    from ray.serve._private.long_poll import LongPollNamespace

    from serve_app.cluster import replicas, serve
    from serve_app.cluster.credential import internal_credential

    key = (
        LongPollNamespace.DEPLOYMENT_TARGETS,
        DeploymentID(name=DEPLOYMENT, app_name=name),
    )
    controller = serve.controller()
    assert controller is not None
    reported = ray.get(controller.listen_for_change.remote({key: -1}), timeout=30)
    credential = internal_credential().decode()
    return [
        {
            id: ModelPort(f"http://{addresses.join(host, port)}", credential)
            for id, (host, port) in replicas.addresses(
                replica.replica_id.unique_id, replica.replica_metadata
            ).items()
        }
        for replica in reported[key].object_snapshot.running_replicas
    ]


def model_ports(name: str) -> dict[str, ModelPort]:
    """The port of the first front end of each of a model's replicas, by replica id.

    Its metrics are the engine's, whichever front end a request came through.
    """
    return {id: port for ports in front_ends(name) for id, port in list(ports.items())[:1]}


def model_port(name: str) -> ModelPort:
    """The port of the first replica of a model."""
    return next(iter(model_ports(name).values()))


class BareVllm:
    """`vllm serve` of the same model with the same engine arguments and environment."""

    def __init__(self, base_url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.base_url = base_url
        self.process = process
        self.log = log

    @classmethod
    def start(cls, application: dict[str, Any], folder: Path) -> BareVllm:
        """`vllm serve`; :meth:`wait_until_ready` comes next."""
        config = ModelConfig.model_validate(application["args"])
        ids = [application["name"], *config.served_as]
        port = processes.free_port()
        command = [
            *(str(BIN / "vllm"), "serve", config.model),
            *("--served-model-name", *ids, "--host", "127.0.0.1", "--port", str(port)),
            *engine_args.to_argv(config.engine),
        ]
        log = folder / "vllm.log"
        process = processes.start(command, log, **environment(config))
        return cls(f"http://127.0.0.1:{port}", process, log)

    def wait_until_ready(self) -> None:
        def up() -> bool:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                return httpx.get(f"{self.base_url}/health").status_code == 200
            except httpx.HTTPError:
                return False

        assert processes.eventually(up, 300, 0.5), self.log.read_text()[-4000:]

    def stop(self) -> None:
        processes.kill_session(self.process.pid)
        self.process.wait()
