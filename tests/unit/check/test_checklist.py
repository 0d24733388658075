"""Each line of the checklist, from a config that fails it."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import configs
from harness.processes import REPO

from serve_app.check import checklist
from serve_app.check.inventory import Node
from serve_app.check.on_cluster import on_cluster
from serve_app.config.document import load
from serve_app.errors import ConfigError, UserError
from serve_app.kuberay.render.files import render
from serve_app.kuberay.render.profile import ClusterProfile
from serve_app.kuberay.validate.judge import judge
from serve_app.planner.finding import Finding
from serve_app.planner.model import metadata

write = partial(configs.write, gateway=True)


def find(findings: list[Finding], check: str, status: str) -> Finding:
    found = [f for f in findings if f.check == check and f.status == status]
    assert found, [(f.check, f.status, f.message) for f in findings]
    return found[0]


def test_a_good_config_has_nothing_to_fix(tmp_path: Path) -> None:
    findings = checklist.static(write(tmp_path), None)
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
        ({"engine": {"--swap-space": 1}}, "engine arguments", "fail", "no longer swaps"),
        ({"engine": {8: 1}}, "engine arguments", "fail", "engine.8 is not an argument"),
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
        (
            {"resources": {"accelerator_type": "p5.48xlarge"}},
            "placement",
            "fail",
            "'p5.48xlarge', a machine of EC2; name its GPU as Ray does, 'H100'",
        ),
        ({"engine": {"tool_call_parser": "hermse"}}, "engine arguments", "fail", "'hermes'?"),
        ({"engine": {"reasoning_parser": "qwen33"}}, "engine arguments", "fail", "'qwen3'?"),
        (
            {"engine": {"enable_auto_tool_choice": True}},
            "engine arguments",
            "fail",
            "needs engine.tool_call_parser",
        ),
        (
            {"engine": {"speculative_config": {"method": "eagel3"}}},
            "engine arguments",
            "fail",
            "'eagle3'?",
        ),
        ({"engine": {"load_format": "safetensor"}}, "engine arguments", "fail", "'safetensors'?"),
        ({"engine": {"accelerator_type": "H100"}}, "engine arguments", "fail", "under resources"),
        ({"engine": {"chat_template": "no.jinja"}}, "chat template", "fail", "there is no file /"),
        ({"engine": {"chat_template": "/a/b.jinja"}}, "chat template", "warn", "/a/b.jinja"),
        ({"frontends": 0}, "config", "fail", "frontends is 0; give a number from 1 to 16, or auto"),
        (
            {"frontends": 12}, "front ends", "warn",
            "num_cpus reserves 8: each front end can keep a core busy set resources.num_cpus to 12",
        ),
        (
            {"frontends": 12, "resources": {"accelerator_type": "A100-40G"},
             "engine": {"tensor_parallel_size": 1}},
            "front ends", "warn",
            "a replica on p4d.24xlarge (95.69 cores, 8 GPUs) has 8 cores for them beside",
        ),
        (
            {"frontends": 4, "model": "nobody/nothing", "resources": {"device": "cpu",
             "num_cpus": 2}, "engine": {"tensor_parallel_size": 1}},
            "front ends", "warn", "num_cpus reserves 2",
        ),
        ({"model": "${MODEL}"}, "config", "fail", "model is '${MODEL}', but variables are not"),
        ({"model": "REPLACE_ME"}, "config", "fail", "model is 'REPLACE_ME', a placeholder"),
        (
            {"env": {"HF_TOKEN": "abc"}}, "secrets", "fail",
            "set HF_TOKEN in the environment of `serve-app run` or `ray start`, which replicas "
            "inherit; on Kubernetes, name a Secret in the profile's hf_token",
        ),
    ],
)  # fmt: skip
def test_what_each_check_catches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any], check: str, status: str, words: str,
) -> None:  # fmt: skip
    def no_hub(name: str, _: object) -> None:
        raise UserError(f"{name}: the hub cannot be reached")

    monkeypatch.setattr(metadata, "_from_hub", no_hub)
    findings = checklist.static(write(tmp_path, **changes), None)
    finding = find(findings, check, status)
    assert words in f"{finding.message} {finding.fix}"
    # The loader's own sentences say what to change.
    assert finding.fix or status != "fail" or check in ("engine arguments", "config")
    assert not finding.message.startswith(finding.about)


def test_what_serve_cuts_or_ignores_is_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path)
    find(checklist.static(path, None), "serve settings", "ok")
    path.write_text("http_options: {request_timeout_s: 60}\n" + path.read_text())
    said = find(checklist.static(path, None), "serve settings", "warn").message
    assert "http_options.request_timeout_s is 60" in said


def test_a_config_without_a_gateway_reaches_no_client(tmp_path: Path) -> None:
    findings = checklist.static(configs.write(tmp_path), None)
    assert "serve_app.gateway:app" in str(find(findings, "gateway", "fail").fix)
    assert not [f for f in checklist.static(write(tmp_path), None) if f.check == "gateway"]


def test_a_fallback_is_for_models_that_generate_text(tmp_path: Path) -> None:
    folder = tmp_path / "embeds"
    folder.mkdir()
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Pooling"}]')
    [name] = load(write(tmp_path)).models

    def said(fallback: dict[str, list[str]]) -> list[tuple[str, str, str]]:
        document = yaml.safe_load(write(tmp_path).read_text())
        embeds = {
            "name": "embeds",
            "route_prefix": None,
            "import_path": "serve_app.model:app",
            "args": {"model": str(folder), "resources": {"device": "cpu"}},
        }
        document["applications"].append(embeds)
        for application in document["applications"]:
            if application["name"] in fallback:
                application["args"]["fallback"] = fallback[application["name"]]
        path = tmp_path / "both.yaml"
        path.write_text(yaml.safe_dump(document))
        found = [f for f in checklist.static(path, None) if f.check == "fallback"]
        return [(f.status, f.about, f.text) for f in found]

    assert said({}) == []
    assert said({name: ["embeds"]}) == [
        ("fail", name, "fallback has 'embeds', which generates no text; remove it")
    ]
    [(status, about, text)] = said({"embeds": [name]})
    assert (status, about) == ("fail", "embeds")
    assert text.startswith("fallback is for models that generate text")


def test_a_model_without_a_chat_template_is_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    shape = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10}
    config = {**shape, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = folder / "tokenizer_config.json"

    def said(**engine: Any) -> list[Finding]:
        path = write(tmp_path, model=str(folder), engine=engine)
        return [f for f in checklist.static(path, None) if f.check == "chat template"]

    assert said() == []  # nothing is known of its tokenizer
    tokenizer.write_text(json.dumps({"model_max_length": 8}))
    [finding] = said()
    assert finding.status == "warn"
    assert "/v1/chat/completions" in finding.message
    assert said(chat_template="template_chatml.jinja") == []  # one of vLLM's own
    assert said(runner="pooling") == []
    assert said(tokenizer_mode="mistral") == []
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "paligemma"}))
    assert said() == []  # vLLM has one
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert said() == []
    (folder / "chat_template.jinja").unlink()
    tokenizer.write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert said() == []


def test_a_token_in_a_piece_to_refer_to_or_in_a_comment_is_found(tmp_path: Path) -> None:
    path = write(tmp_path)
    text = path.read_text()
    for more in ("x-env: {A: hf_" + "a" * 30 + "}\n", "# was: hf_" + "a" * 30 + "\n"):
        path.write_text(more + text)
        assert "looks like a token" in find(checklist.static(path, None), "secrets", "fail").message


def test_secrets_are_never_repeated(tmp_path: Path) -> None:
    secret = "hf_" + "Q" * 30
    findings = checklist.static(write(tmp_path, env={"HF_TOKEN": secret}), None)
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
    assert words in find(checklist.static(path, None), "quantization", status).message


def test_renamed_metrics_anywhere_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text() + "# alert on vllm:gpu_cache_usage_perc > 0.9\n")
    finding = find(checklist.static(path, None), "metrics", "fail")
    assert finding.fix == "use vllm:kv_cache_usage_perc"


def test_all_wrong_arguments_show_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, engine={"tp": 4, "swap_space": 4, "max_num_seq": 8})
    wrong = [f for f in checklist.static(path, None) if f.status == "fail"]
    assert len(wrong) == 3
    assert {f.check for f in wrong} == {"engine arguments"}


@pytest.mark.parametrize("text", ["", "[]", "applications: 3", "{"])
def test_what_is_no_config_cannot_be_checked(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError):
        checklist.static(path, None)


# --- rendered manifests ------------------------------------------------------------------------

MONITOR = {
    "apiVersion": "monitoring.coreos.com/v1",
    "kind": "PodMonitor",
    "metadata": {"name": "ray"},
    "spec": {"selector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}},
}
BOARD = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "ray", "labels": {"grafana_dashboard": "1"}},
}


def rendered(config: Path) -> list[Any]:
    """What `serve-app render` makes of a config, and its monitoring."""
    profile = ClusterProfile.model_validate({"max_gpus": 32})
    files = render(load(config), profile)
    documents = [d for text in files.values() for d in yaml.safe_load_all(text)]
    return [d for d in documents if d and "kustomize" not in d.get("apiVersion", "")] + [BOARD]


def part(documents: list[Any], kind: str) -> Any:
    return next(d for d in documents if d["kind"] == kind)


def workers(documents: list[Any]) -> Any:
    """The spec of the GPU pods."""
    groups = part(documents, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return groups[1]["template"]["spec"]


def test_good_manifests(tmp_path: Path) -> None:
    path = write(tmp_path, replicas=2)
    findings = checklist.static(path, rendered(path))
    assert {f.status for f in findings} == {"ok"}, findings
    for check in (
        "memory", "shared memory", "autoscaling", "model cache", "head node", "machines",
        "draining", "secrets", "versions", "metrics", "dashboards",
    ):  # fmt: skip
        find(findings, check, "ok")


def test_without_manifests_it_is_said_what_is_not_checked(tmp_path: Path) -> None:
    findings = checklist.static(write(tmp_path), None)
    missing = find(findings, "manifests", "warn")
    assert "shared memory, autoscaling, model cache" in missing.message
    assert missing.fix and "serve-app render" in missing.fix
    assert not {"shared memory", "autoscaling"} & {f.check for f in findings}
    other = find(checklist.static(write(tmp_path), [MONITOR]), "manifests", "warn")
    assert "no RayService" in other.message


def test_wrong_manifests(tmp_path: Path) -> None:
    path = write(tmp_path)
    documents = [d for d in rendered(path) if d not in (BOARD,) and d["kind"] != "PodMonitor"]
    cluster = part(documents, "RayService")["spec"]["rayClusterConfig"]
    cluster["rayVersion"] = "2.59.0"
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    head["resources"]["limits"]["nvidia.com/gpu"] = "1"
    head["resources"]["requests"]["nvidia.com/gpu"] = "1"
    pod = workers(documents)
    pod["volumes"] = [v for v in pod["volumes"] if "persistentVolumeClaim" not in v]
    container = pod["containers"][0]
    container["volumeMounts"] = []
    container["image"] = "registry/serve-app"
    container["env"] = [{"name": "HF_TOKEN", "value": "hf_" + "b" * 30}]
    write(tmp_path, replicas=9)
    findings = checklist.static(path, documents)
    assert "holds another config" in find(findings, "manifests", "warn").message
    assert "64 MiB" in find(findings, "shared memory", "fail").message
    assert "asks for a GPU" in find(findings, "head node", "fail").message
    assert "the models may ask for 36" in find(findings, "autoscaling", "fail").message
    versions = str([f for f in findings if f.check == "versions"])
    assert "'2.59.0'" in versions and "name a fixed tag" in versions
    assert "downloads its weights at each start" in find(findings, "model cache", "warn").message
    assert "nothing scrapes" in find(findings, "metrics", "warn").message
    find(findings, "dashboards", "warn")
    assert "HF_TOKEN" in find(findings, "secrets", "fail").message
    assert "b" * 30 not in str(findings)


def test_it_finds_what_validate_finds(tmp_path: Path) -> None:
    path = write(tmp_path, replicas=2)
    documents = rendered(path)
    part(documents, "Ingress")["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"][
        "name"
    ] = "other"
    workers(documents)["terminationGracePeriodSeconds"] = 5
    wrong = [f for f in checklist.static(path, documents) if f.status != "ok"]
    assert wrong == judge(documents) and len(wrong) == 2
    assert {f.check for f in wrong} == {"network", "draining"}


def test_what_kuberay_refuses_is_no_ground_for_an_ok(tmp_path: Path) -> None:
    path = write(tmp_path)
    documents = rendered(path)
    part(documents, "RayService")["metadata"]["name"] = "Llama"
    findings = checklist.static(path, documents)
    assert "is 'Llama'" in find(findings, "manifests", "fail").message
    assert not {"shared memory", "autoscaling", "machines"} & {f.check for f in findings}


@pytest.mark.parametrize(
    ("size", "fix"),
    [("512Mi", "set it to 4Gi"), ("2Gi", "set it to 4Gi"), ("3Gi", None)],
)
def test_shared_memory_holds_the_queues_and_the_object_store(
    tmp_path: Path, size: str, fix: str | None
) -> None:
    path = write(tmp_path)
    documents = rendered(path)
    volume = next(v for v in workers(documents)["volumes"] if v["name"] == "dshm")
    volume["emptyDir"]["sizeLimit"] = size
    findings = checklist.static(path, documents)
    if fix is None:
        find(findings, "shared memory", "ok")
    else:
        assert (find(findings, "shared memory", "fail").fix or "").startswith(fix)


def test_manifests_are_found_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    base = tmp_path / "kuberay/llama/base"
    base.mkdir(parents=True)
    service = {"kind": "RayService"}
    (base / "rayservice.yaml").write_text(yaml.safe_dump(service))
    monitoring = tmp_path / "kuberay/monitoring"
    monitoring.mkdir()
    (monitoring / "pods.yaml").write_text(yaml.safe_dump_all([MONITOR, BOARD]))
    other = tmp_path / "kuberay/other"
    other.mkdir()
    (other / "profile.yaml").write_text("max_gpus: 3\n")
    assert checklist.find(tmp_path / "configs/llama.yaml", None) == [service, MONITOR, BOARD]
    assert checklist.find(tmp_path / "configs/other.yaml", None) is None
    assert checklist.find(tmp_path / "configs/third.yaml", None) is None
    assert checklist.find(tmp_path / "configs/other.yaml", monitoring) == [MONITOR, BOARD]
    with pytest.raises(ConfigError, match="no such file or folder"):
        checklist.find(tmp_path / "configs/llama.yaml", tmp_path / "nowhere")


# --- a cluster ---------------------------------------------------------------------------------


class FakeInventory:
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
    path = write(tmp_path)
    documents = [d for d in rendered(path) if d["kind"] != "PersistentVolumeClaim"]
    cluster = FakeInventory(
        Node("gpu-1", 8, gpu_type="NVIDIA-H100-80GB-HBM3"),
        secrets={"hf-token", "ray-auth"},
        classes={"CRD/rayservices.ray.io", "StorageClass/gp3"},
    )
    findings = on_cluster(load(path), cluster, documents)
    assert {f.status for f in findings} == {"ok"}, findings


def test_a_cluster_without(tmp_path: Path) -> None:
    path = write(tmp_path)
    fleet = load(path)
    claim = {"kind": "PersistentVolumeClaim", "spec": {"storageClassName": "efs"}}
    cluster = FakeInventory(Node("small", 1, is_head=True, gpu_type="h100"))
    findings = on_cluster(fleet, cluster, [*rendered(path), claim])
    failed = " ".join(f.message for f in findings if f.status == "fail")
    for words in ("the largest has 1", "'hf-token' does not exist", "RayService", "'efs'"):
        assert words in failed
    find(findings, "head node", "warn")
    other = FakeInventory(Node("other", 8, gpu_type="a10g"), classes={"CRD/rayservices.ray.io"})
    findings = on_cluster(fleet, other, None)
    assert "no node with H100" in find(findings, "cluster", "warn").message


@pytest.mark.parametrize(
    ("resources", "cores", "gpu_type", "words"),
    [
        ({"accelerator_type": "H100"}, 40, "NVIDIA-H100-80GB-HBM3", "gpu-1 (40 cores, 8 GPUs)"),
        ({"accelerator_type": "H100"}, 60, "NVIDIA-H100-80GB-HBM3", None),
        ({"accelerator_type": "H100"}, 0, "NVIDIA-H100-80GB-HBM3", None),  # it does not say
        ({"accelerator_type": "H100"}, 40, "a10g", None),  # of another type
        ({}, 40, "a10g", "has 14 cores for them"),
        ({"device": "cpu"}, 4, "a10g", "has 2 cores for them"),
    ],
)
def test_nodes_with_too_few_cores_for_the_front_ends(
    tmp_path: Path, resources: dict[str, Any], cores: float, gpu_type: str, words: str | None
) -> None:
    path = write(tmp_path, resources=resources, frontends=15)
    cluster = FakeInventory(Node("gpu-1", 8, gpu_type=gpu_type, cores=cores))
    said = [f for f in on_cluster(load(path), cluster, None) if f.check == "front ends"]
    assert [f.status for f in said] == ["warn"] * (words is not None)
    assert words is None or words in said[0].message
    auto = on_cluster(load(write(tmp_path, resources=resources)), cluster, None)
    assert "front ends" not in {f.check for f in auto}


def test_pods_with_too_few_cores_for_the_front_ends(tmp_path: Path) -> None:
    path = write(tmp_path, replicas=2, frontends=8)
    documents = rendered(path)
    assert {f.status for f in checklist.static(path, documents)} == {"ok"}
    group = part(documents, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]
    group["resources"]["CPU"] = "12"
    (finding,) = judge(documents)
    assert (finding.check, finding.status) == ("front ends", "warn")
    assert "a pod of 'h100-x4' (12 cores, 4 GPUs) has 6 cores for them" in finding.message


def test_a_replica_that_no_node_has_the_cores_for(tmp_path: Path) -> None:
    fleet = load(write(tmp_path, resources={"device": "cpu", "num_cpus": 8}))
    small = on_cluster(fleet, FakeInventory(Node("a", 0, cpus=2.0), Node("b", 0, cpus=4.0)), None)
    assert find(small, "cluster", "fail").text == (
        "resources.num_cpus is 8, and the largest node has 4; lower it"
    )
    for cpus in (8.0, None):  # None: nodes may come
        findings = on_cluster(fleet, FakeInventory(Node("c", 0, cpus=cpus)), None)
        assert {f.status for f in findings} == {"ok"}


def test_a_fleet_without_gpus_is_held_against_this_machine(tmp_path: Path) -> None:
    path = write(tmp_path, resources={"device": "cpu", "num_cpus": 5000})
    assert "num_cpus is 5000" in find(checklist.static(path, None), "this machine", "fail").message


@pytest.mark.parametrize("arguments", ["7", "[1]", "{engine: 5}", "{model: x, engine: [1]}"])
def test_args_that_are_no_mapping_are_a_finding(tmp_path: Path, arguments: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "applications:\n- {name: a, route_prefix: null, import_path: serve_app.model:app, "
        f"args: {arguments}}}\n"
    )
    (finding,) = checklist.static(config, None)
    assert (finding.check, finding.status) == ("config", "fail")
    assert "application 'a'" in finding.message


def test_what_shares_a_gpu_is_added_up() -> None:
    path = REPO / "configs/one-gpu.yaml"
    assert checklist.gpus_needed(load(path)) == (1, 1)
    said = find(checklist.static(path, None), "shared GPU", "ok").text
    assert said == "chat 0.8 + embeddings 0.1 + reranker 0.1 of L40S, 0 left"
    fleet = load(REPO / "configs/fleet.yaml")  # 4 H100 and an L40S each, halves of an L4
    assert checklist.gpus_needed(fleet) == (4 + 1 + 1, 8 + 4 + 2)


def test_a_part_that_is_too_small_fails_with_one_that_would_do(tmp_path: Path) -> None:
    text = (REPO / "configs/one-gpu.yaml").read_text().replace("gpu_share: 0.8", "gpu_share: 0.3")
    path = tmp_path / "small.yaml"
    path.write_text(text)
    failed = find(checklist.static(path, None), "memory", "fail")
    assert failed.about == "chat" and re.search(r"gpu_share 0\.4\d would fit", failed.text)
