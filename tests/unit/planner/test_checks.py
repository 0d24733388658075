"""Each line of the checklist, from a config that fails it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.config.document import MODEL_IMPORT_PATH, load
from serve_app.errors import ConfigError, UserError
from serve_app.planner import check_cluster, checks, manifests
from serve_app.planner.cluster import KubernetesCluster, Node, RayCluster
from serve_app.planner.finding import Finding
from serve_app.planner.model import metadata

LLAMA_70B = {
    "model": "meta-llama/Llama-3.3-70B-Instruct",
    "replicas": 1,
    "resources": {"accelerator_type": "H100", "num_cpus": 8},
    "engine": {"tensor_parallel_size": 4, "max_model_len": 8192},
}


def write(tmp_path: Path, **changes: Any) -> Path:
    """A config of one model, its args changed; ``engine`` is merged."""
    engine = {**LLAMA_70B["engine"], **changes.pop("engine", {})}  # type: ignore[dict-item]
    application: dict[str, Any] = {
        "name": "llama",
        "route_prefix": None,
        "import_path": MODEL_IMPORT_PATH,
        "args": {**LLAMA_70B, "engine": engine, **changes},
    }
    if runtime_env := application["args"].pop("runtime_env", None):
        application["runtime_env"] = runtime_env
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return path


def find(findings: list[Finding], check: str, status: str) -> Finding:
    found = [f for f in findings if f.check == check and f.status == status]
    assert found, [(f.check, f.status, f.message) for f in findings]
    return found[0]


def test_a_good_config_has_nothing_to_fix(tmp_path: Path) -> None:
    findings = checks.static(write(tmp_path), None)
    assert not [f for f in findings if f.status == "fail"]
    for check in ("engine arguments", "parallelism", "quantization", "memory", "context length"):
        find(findings, check, "ok")
    assert "p5.48xlarge" in find(findings, "memory", "ok").message


@pytest.mark.parametrize(
    ("changes", "check", "status", "words"),
    [
        ({"engine": {"tensor_parallel_size": 1}}, "memory", "fail", "weights"),
        ({"engine": {"tensor_parallel_size": 6}}, "parallelism", "fail", "64 attention heads"),
        ({"engine": {"data_parallel_backend": "ray"}}, "placement", "fail", "is not yours to set"),
        ({"env": {"VLLM_RAY_BUNDLE_INDICES": "0,1"}}, "placement", "fail", "Ray places the ranks"),
        (
            {"resources": {"accelerator_type": "h100"}},
            "placement",
            "fail",
            "accelerator_type is 'h100', but Ray writes 'H100'",
        ),
        ({"engine": {"tensor_parallel_size": 16}}, "parallelism", "fail", "8 GPUs of the largest"),
        ({"engine": {"max_model_len": 200_000}}, "context length", "fail", "the model's 131072"),
        (
            {"engine": {"tensor_parallel_size": 2, "max_model_len": 17_000}},
            "memory", "warn", "less than 3 %",
        ),
        (
            {"engine": {"tensor_parallel_size": 2, "max_model_len": 12_000}},
            "context length", "warn", "1.",
        ),
        ({"engine": {"enable_expert_parallel": True}}, "parallelism", "fail", "mixture of experts"),
        ({"engine": {"speculative_model": "x"}}, "engine arguments", "fail", "speculative_model"),
        ({"engine": {"max_modle_len": 1}}, "engine arguments", "fail", "max_model_len"),
        ({"engine": {"disable_log_stats": True}}, "metrics", "fail", "disable_log_stats"),
        ({"env": {"HF_TOKEN": "abc"}}, "secrets", "fail", "HF_TOKEN holds a secret"),
        ({"env": {"X": "hf_" + "a" * 30}}, "secrets", "fail", "X holds a secret"),
        (
            {"runtime_env": {"pip": ["vllm==0.10.1"]}},
            "versions", "fail", "pins vllm==0.10.1",
        ),
        ({"resources": {"num_cpus": 1}}, "memory", "warn", "accelerator_type is not set"),
        (
            {"resources": {"accelerator_type": "H100", "num_cpus": 500}},
            "memory", "fail", "no EC2 machine",
        ),
        ({"model": "nobody/nothing"}, "memory", "warn", "not checked"),
    ],
)  # fmt: skip
def test_what_each_check_catches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any], check: str, status: str, words: str,
) -> None:  # fmt: skip
    def no_hub(name: str) -> None:
        raise UserError(f"{name}: the hub cannot be reached")

    monkeypatch.setattr(metadata, "_from_hub", no_hub)
    findings = checks.static(write(tmp_path, **changes), None)
    finding = find(findings, check, status)
    assert words in f"{finding.message} {finding.fix}"
    assert finding.fix or status != "fail" or check in ("engine arguments",)


def test_secrets_are_never_repeated(tmp_path: Path) -> None:
    secret = "hf_" + "Q" * 30
    findings = checks.static(write(tmp_path, env={"HF_TOKEN": secret}), None)
    assert secret not in str(findings)


@pytest.mark.parametrize(
    ("model", "gpu", "engine", "status", "words"),
    [
        ("Qwen/Qwen3-32B-FP8", "A100-80G", {}, "warn", "no fp8 arithmetic"),
        ("Qwen/Qwen3-32B-FP8", "V100", {}, "fail", "too old"),
        ("Qwen/Qwen2.5-32B-Instruct-AWQ", "L40S", {}, "ok", "awq int4 runs on L40S"),
        (
            "HuggingFaceTB/SmolLM2-135M-Instruct", "A10G",
            {"kv_cache_dtype": "fp8"}, "fail", "fp8 KV cache",
        ),
    ],
)  # fmt: skip
def test_precision_against_the_gpu(
    tmp_path: Path, model: str, gpu: str, engine: dict[str, Any], status: str, words: str
) -> None:
    path = write(
        tmp_path,
        model=model,
        resources={"accelerator_type": gpu, "num_cpus": 1},
        engine={"tensor_parallel_size": 1, **engine},
    )
    assert words in find(checks.static(path, None), "quantization", status).message


def test_renamed_metrics_anywhere_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text() + "# alert on vllm:gpu_cache_usage_perc > 0.9\n")
    finding = find(checks.static(path, None), "metrics", "fail")
    assert finding.fix == "use vllm:kv_cache_usage_perc"


def test_all_wrong_arguments_show_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, engine={"tp": 4, "swap_space": 4, "max_num_seq": 8})
    wrong = [f for f in checks.static(path, None) if f.status == "fail"]
    assert len(wrong) == 3
    assert {f.check for f in wrong} == {"engine arguments"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": {"tensor_parallel_size": 1}}, "weights.* smallest that fits on H100 is TP"),
        ({"engine": {"tensor_parallel_size": 6}}, "can be 1, 2, 4, 8"),
        ({"resources": {"accelerator_type": "V100"}}, "too old"),
    ],
)
def test_run_refuses_what_cannot_work(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"application 'llama': .*{words}") as refused:
        checks.refuse(load(write(tmp_path, **changes)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"engine": {"tensor_parallel_size": 2, "max_model_len": 131_072}},  # an estimate says no
        {"engine": {"tensor_parallel_size": 16}},  # no EC2 machine, but there are others
        {"engine": {"tensor_parallel_size": 1, "cpu_offload_gb": 100}},
        {"engine": {"tensor_parallel_size": 1}, "resources": {}},  # on which GPU is not said
        {"engine": {"tensor_parallel_size": 1}, "resources": {"accelerator_type": "MI300X"}},
        {"engine": {"tensor_parallel_size": 6, "hf_overrides": {"num_attention_heads": 6}}},
        {"model": "nobody/nothing"},
        {
            "model": "./models/other",  # may be any model, whatever it is called
            "served_as": [LLAMA_70B["model"]],
            "engine": {"tensor_parallel_size": 1},
        },
    ],
)
def test_run_starts_whatever_might_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    judged = []
    monkeypatch.setattr(metadata, "_from_hub", judged.append)
    checks.refuse(load(write(tmp_path, **changes)))
    assert not judged  # the hub was not asked


def test_run_starts_every_shipped_config() -> None:
    configs = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
    for path in configs:
        checks.refuse(load(path))
    assert len(configs) > 5


@pytest.mark.parametrize("text", ["", "[]", "applications: 3", "{"])
def test_what_is_no_config_cannot_be_checked(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError):
        checks.static(path, None)


# --- rendered manifests ------------------------------------------------------------------------


def service(**changes: Any) -> dict[str, Any]:
    """A RayService with one group of 4-GPU pods; changes are for the worker's container."""
    container = {
        "name": "ray-worker",
        "image": "registry/serve-app:0.1.0",
        "resources": {"limits": {"nvidia.com/gpu": "4"}},
        "env": [
            {"name": "HF_HOME", "value": "/models/huggingface"},
            {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}},
        ],
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "models", "mountPath": "/models"},
        ],
        **changes,
    }
    volumes = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
        {"name": "models", "persistentVolumeClaim": {"claimName": "models"}},
    ]
    worker = {
        "groupName": "h100-x4",
        "maxReplicas": 2,
        "template": {"spec": {"containers": [container], "volumes": volumes}},
    }
    head = {"containers": [{"name": "ray-head", "image": "registry/serve-app:0.1.0"}]}
    return {
        "kind": "RayService",
        "spec": {
            "rayClusterConfig": {
                "rayVersion": "2.60.0",
                "headGroupSpec": {"template": {"spec": head}},
                "workerGroupSpecs": [worker],
            }
        },
    }


def rendered(*documents: dict[str, Any]) -> manifests.Manifests:
    return manifests.Manifests(Path("kuberay/llama"), documents)


MONITOR = {"kind": "PodMonitor", "metadata": {"name": "ray"}}
BOARD = {"kind": "ConfigMap", "metadata": {"labels": {"grafana_dashboard": "1"}}}


def test_good_manifests(tmp_path: Path) -> None:
    findings = checks.static(write(tmp_path), rendered(service(), MONITOR, BOARD))
    assert {f.status for f in findings} == {"ok"}, findings


def test_wrong_manifests(tmp_path: Path) -> None:
    path = write(tmp_path, replicas=4)
    no_shm = service(volumeMounts=[], image="registry/serve-app", env=[
        {"name": "HF_TOKEN", "value": "hf_" + "b" * 30}])  # fmt: skip
    cluster = no_shm["spec"]["rayClusterConfig"]
    cluster["rayVersion"] = "2.9.0"
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    head["resources"] = {"limits": {"nvidia.com/gpu": 1}}
    findings = checks.static(path, rendered(no_shm))
    assert "64 MiB" in find(findings, "shared memory", "fail").message
    assert "the head asks for 1 GPUs" in find(findings, "head node", "fail").message
    assert "16 to 16 GPUs" in find(findings, "autoscaling", "fail").message
    assert "'2.9.0'" in find(findings, "versions", "fail").message
    assert "not pinned" in find(findings, "versions", "warn").message
    assert "lost with the pod" in find(findings, "model cache", "warn").message
    assert "nothing scrapes" in find(findings, "metrics", "warn").message
    find(findings, "dashboards", "warn")
    assert "HF_TOKEN" in find(findings, "secrets", "fail").message


def test_small_shared_memory(tmp_path: Path) -> None:
    document = service()
    spec = document["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    spec["volumes"][0]["emptyDir"]["sizeLimit"] = "512Mi"
    finding = find(checks.static(write(tmp_path), rendered(document)), "shared memory", "fail")
    assert finding.fix == "set sizeLimit to 3Gi"


def test_manifests_are_found_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    base = tmp_path / "kuberay/llama/base"
    base.mkdir(parents=True)
    (base / "rayservice.yaml").write_text(yaml.safe_dump(service()))
    monitoring = tmp_path / "kuberay/monitoring"
    monitoring.mkdir()
    (monitoring / "pods.yaml").write_text(yaml.safe_dump_all([MONITOR, BOARD]))
    found = manifests.find(tmp_path / "configs/llama.yaml", None)
    assert found is not None
    assert [pod.name for pod in found.pods()] == ["head", "h100-x4"]
    assert len(found.of_kind("PodMonitor", "ConfigMap")) == 2
    assert manifests.find(tmp_path / "configs/other.yaml", None) is None
    with pytest.raises(ConfigError, match="no such file or folder"):
        manifests.find(tmp_path / "configs/llama.yaml", tmp_path / "nowhere")


# --- a cluster ---------------------------------------------------------------------------------


class FakeCluster:
    kind = "Kubernetes"

    def __init__(
        self, *nodes: Node, secrets: set[str] = frozenset(), classes: set[str] = frozenset()
    ):  # type: ignore[assignment]
        self._nodes, self._secrets, self._classes = list(nodes), secrets, classes

    def nodes(self) -> list[Node]:
        return self._nodes

    def secrets(self) -> set[str] | None:
        return self._secrets

    def classes(self) -> set[str] | None:
        return self._classes


def test_a_cluster_with_what_is_needed(tmp_path: Path) -> None:
    fleet = load(write(tmp_path))
    cluster = FakeCluster(
        Node("gpu-1", 8, gpu_type="NVIDIA-H100-80GB-HBM3"),
        secrets={"hf"},
        classes={"CRD/rayservices.ray.io", "StorageClass/gp3"},
    )
    findings = check_cluster.on_cluster(fleet, cluster, rendered(service()))
    assert {f.status for f in findings} == {"ok"}, findings


def test_a_cluster_without(tmp_path: Path) -> None:
    fleet = load(write(tmp_path))
    claim = {"kind": "PersistentVolumeClaim", "spec": {"storageClassName": "efs"}}
    cluster = FakeCluster(Node("small", 1, is_head=True, gpu_type="h100"))
    findings = check_cluster.on_cluster(fleet, cluster, rendered(service(), claim))
    failed = " ".join(f.message for f in findings if f.status == "fail")
    for words in ("the largest has 1", "'hf' does not exist", "RayService", "'efs'"):
        assert words in failed
    find(findings, "head node", "warn")
    other = FakeCluster(Node("other", 8, gpu_type="a10g"), classes={"CRD/rayservices.ray.io"})
    findings = check_cluster.on_cluster(fleet, other, None)
    assert "no node with H100" in find(findings, "cluster", "warn").message


def test_ray_nodes_are_read() -> None:
    raw = [
        {"Alive": True, "NodeManagerHostname": "head", "Resources": {"node:__internal_head__": 1}},
        {"Alive": True, "NodeManagerHostname": "a", "Resources": {"GPU": 8.0,
         "accelerator_type:H100": 1.0}},
        {"Alive": False, "NodeManagerHostname": "gone", "Resources": {"GPU": 8.0}},
    ]  # fmt: skip
    cluster = RayCluster(raw)
    assert cluster.nodes() == [Node("head", 0, is_head=True), Node("a", 8, gpu_type="H100")]
    assert cluster.secrets() is None


def test_kubernetes_nodes_are_read() -> None:
    node = {
        "metadata": {"name": "ip-10", "labels": {
            "node.kubernetes.io/instance-type": "p5.48xlarge",
            "karpenter.k8s.aws/instance-gpu-name": "h100"}},
        "status": {"allocatable": {"nvidia.com/gpu": "8"}},
    }  # fmt: skip
    answers = {
        "nodes": [node],
        "secrets": [{"metadata": {"name": "hf"}}],
        "storageclasses": [{"metadata": {"name": "gp3"}}],
        "customresourcedefinitions": [{"metadata": {"name": "rayservices.ray.io"}}],
    }
    cluster = KubernetesCluster(lambda resource: answers[resource])
    assert cluster.nodes() == [Node("ip-10", 8, gpu_type="h100", instance_type="p5.48xlarge")]
    assert cluster.secrets() == {"hf"}
    assert cluster.classes() == {"StorageClass/gp3", "CRD/rayservices.ray.io"}


@pytest.mark.parametrize("address", ["127.0.0.1:9", "[::1]:9"])
def test_a_cluster_that_is_gone_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=rf"no Ray cluster answers at {re.escape(address)} \("):
        RayCluster.connect()


@pytest.mark.parametrize("address", ["::1:9", "here"])
def test_an_address_that_is_none_is_said_to_be_so(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=rf"RAY_ADDRESS is {address}; write it as host:port"):
        RayCluster.connect()


@pytest.mark.parametrize("arguments", ["7", "[1]", "{engine: 5}", "{model: x, engine: [1]}"])
def test_args_that_are_no_mapping_are_a_finding(tmp_path: Path, arguments: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "applications:\n- {name: a, route_prefix: null, import_path: serve_app.model:app, "
        f"args: {arguments}}}\n"
    )
    (finding,) = checks.static(config, None)
    assert (finding.check, finding.status) == ("config", "fail")
    assert "application 'a'" in finding.message
