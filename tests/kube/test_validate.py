"""The corpus: each real mistake gives one line that names the field; what is right gives none."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.manifests import CRD, NAMES, ROOT, bundle, edit
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import ConfigError, UserError
from serve_app.kuberay.validate import manifests, schema
from serve_app.kuberay.validate.judge import judge, refuse_errors
from serve_app.planner.finding import Finding

CORPUS: list[dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "data/wrong_manifests.yaml").read_text()
)

_BUNDLE = bundle("fleet")


def said(findings: list[Finding]) -> list[str]:
    """The line of each, as `serve-app validate` prints it."""
    return [f"{finding.about} {finding.text}" for finding in findings]


@pytest.fixture(scope="module")
def crd() -> dict[str, Any]:
    return schema.load_crd(CRD)


@pytest.fixture(scope="module")
def right() -> list[dict[str, Any]]:
    return bundle("fleet")


@pytest.mark.parametrize("case", CORPUS, ids=[c["mistake"] for c in CORPUS])
def test_a_mistake_gives_one_line_that_names_the_field(
    case: dict[str, Any], right: list[dict[str, Any]], crd: dict[str, Any]
) -> None:
    status = "warn" if case.get("level") == "warning" else "fail"
    found = judge(edit(right, case["edit"]), crd)
    lines = said([f for f in found if f.status == status])
    assert len(lines) == 1, "\n".join(said(found)) or "nothing was found"
    assert case["says"] in lines[0] and "\n" not in lines[0], lines[0]
    assert status == "fail" or lines == said(found)


def test_the_corpus_is_large_enough() -> None:
    assert len(CORPUS) >= 25
    assert len({c["mistake"] for c in CORPUS}) == len(CORPUS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"upgrade": {"strategy": "NewClusterWithIncrementalUpgrade"}},
        {"karpenter": "auto-mode", "hf_token": None},
        {"redis": {"address": "rediss://a.b:6379", "password": {"name": "redis", "key": "p"}}},
    ],
    ids=["default", "incremental", "auto-mode", "redis"],
)
def test_what_is_rendered_has_no_problem(
    name: str, changes: dict[str, Any], crd: dict[str, Any]
) -> None:
    if name == "llama70b-2node":
        changes = {**changes, "instance_types": ["g6e.12xlarge"]}
    assert judge(bundle(name, **changes), crd) == []


def test_pods_on_several_machines_without_their_network_or_zone_are_a_warning() -> None:
    right = bundle("llama70b-2node", instance_types=["g6e.12xlarge"])
    pods = "spec.rayClusterConfig.workerGroupSpecs.1.template.spec"
    efa = "vpc\\.amazonaws\\.com/efa"
    changes = {
        f"{pods}.containers.0.resources.limits.{efa}-": None,
        f"{pods}.containers.0.resources.requests.{efa}-": None,
        f"{pods}.affinity.podAffinity-": None,
    }
    problems = judge(edit(right, {"RayService": changes}))
    assert [p.status for p in problems] == ["warn", "warn"]
    network, zone = said(problems)
    assert "vpc.amazonaws.com/efa is missing: the pods of a replica talk over TCP" in network
    assert "affinity.podAffinity does not keep the pods of a replica in one zone" in zone


def test_weights_of_the_hub_without_a_volume_are_a_warning_and_those_on_s3_are_none() -> None:
    found = judge(bundle("llama70b", cache={"kind": "none"}))
    assert [f.status for f in found] == ["warn"]
    assert "'llama-3.3-70b' downloads its weights at each start" in found[0].message
    assert "has no volume at /tmp/.cache/huggingface that" in said(found)[0]  # HOME is /tmp
    streamed = edit(
        bundle("llama70b", cache={"kind": "none"}),
        {
            "RayService": {
                "spec.serveConfigV2~": [
                    "model: meta-llama/Llama-3.3-70B-Instruct",
                    "model: s3://bucket/llama-3.3-70b",
                ]
            }
        },
    )
    assert judge(streamed) == []


def test_whoever_installs_the_application_gets_the_schemas_of_built_in_kinds() -> None:
    """As an extra for developers, it left a user's `validate` without any, and nobody told."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "kubernetes-validate" in {re.split("[<>=]", d)[0] for d in project["dependencies"]}
    for lock in ("cpu.lock", "cuda.lock"):
        assert "\nkubernetes-validate==" in (ROOT / "requirements" / lock).read_text()


@pytest.mark.parametrize("with_crd", [True, False])
def test_an_amount_that_is_none_is_one_line(
    with_crd: bool, right: list[dict[str, Any]], crd: dict[str, Any]
) -> None:
    at = "spec.rayClusterConfig.workerGroupSpecs.1.template.spec.containers.0.resources.limits"
    wrong = edit(right, {"RayService": {f"{at}.memory": "900Gib"}})
    (line,) = said(judge(wrong, crd if with_crd else None))
    assert line.endswith("limits.memory is '900Gib'; write an amount as 4, 500m or 16Gi")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (4, 4), ("1.5", 1.5), ("3920m", 3920 / 1000), ("16Gi", 16 * 2**30), ("2k", 2000),
        ("1e3", 1000), ("1E", 10**18), ("900Gib", None), ("-1", None), ("", None), (None, None),
    ],
)  # fmt: skip
def test_an_amount_is_what_kubernetes_reads(written: Any, meant: float | None) -> None:
    assert manifests.amount(written) == meant


def test_a_gpu_that_nobody_has_is_told_by_the_group_that_names_it(
    right: list[dict[str, Any]],
) -> None:
    """It ended the validation, and with it every other finding."""
    at = "spec.rayClusterConfig.workerGroupSpecs.1.resources"
    wrong = edit(right, {"RayService": {at: {"GPU": "4", "accelerator_type:H1000": "1"}}})
    assert "workerGroupSpecs[1].resources names an unknown GPU" in said(judge(wrong))[0]


def test_without_the_crd_fields_and_pods_are_still_checked(right: list[dict[str, Any]]) -> None:
    wrong = edit(
        right,
        {
            "RayService": {
                "spec.rayClusterConfig.headGroupSpec.template.spec.containers.0.imagePolicy": "x",
                "spec.rayClusterConfig.rayversion": "2.60.0",
            }
        },
    )
    lines = "\n".join(said(judge(wrong)))
    number = {"spec.rayClusterConfig.headGroupSpec.rayStartParams.num-cpus": 0}
    (line,) = said(judge(edit(right, {"RayService": number})))
    assert line.endswith("rayStartParams.num-cpus is 0, but must be of type string")
    assert "containers[0].imagePolicy is not a field; did you mean 'imagePullPolicy'?" in lines
    assert "rayversion is not a field; did you mean 'rayVersion'?" in lines


_odd = st.none() | st.booleans() | st.integers(-1, 9) | st.text("aZ0.-/ü\n", max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_manifest_makes_the_validator_itself_fail(data: st.DataObject) -> None:
    """One value somewhere in the bundle is replaced by another of any kind."""
    documents = copy.deepcopy(_BUNDLE)
    at: Any = documents
    while True:
        key = data.draw(st.sampled_from(range(len(at)) if isinstance(at, list) else sorted(at)))
        deeper = isinstance(at[key], dict | list) and at[key]
        if not deeper or (at is not documents and data.draw(st.integers(0, 4)) == 0):
            break
        at = at[key]
    kinds = st.lists(_odd, max_size=2) | st.dictionaries(
        st.sampled_from(["name", "spec", "a/b"]), _odd, max_size=2
    )
    at[key] = data.draw(_odd | kinds)
    documents = [d for d in documents if isinstance(d, dict) and isinstance(d.get("kind"), str)]
    for problem in judge(documents):
        assert "\n" not in f"{problem.about} {problem.text}"


def test_idle_gpus_are_a_warning_and_no_error(right: list[dict[str, Any]]) -> None:
    one = edit(
        right,
        {
            "RayService": {
                "spec.rayClusterConfig.workerGroupSpecs.1.maxReplicas": 1,
                "spec.serveConfigV2~": [
                    "autoscaling: {min_replicas: 1, max_replicas: 2}\n    resources: "
                    "{accelerator_type: H100",
                    "replicas: 1\n    resources: {accelerator_type: H100",
                ],
            }
        },
    )
    problems = judge(one)
    assert [p.status for p in problems] == ["warn"]
    assert "leaves 4 of the 8 GPUs of the last p5.48xlarge idle" in problems[0].message
    refuse_errors(problems)


def test_errors_are_refused_with_the_first_and_the_number_of_others() -> None:
    problems = [
        Finding("resources", "fail", "Pod/a: spec", "is x"),
        Finding("resources", "fail", "Pod/b: spec", "is y"),
    ]
    with pytest.raises(UserError, match=r"^Pod/a: spec is x \(and 1 more\)$"):
        refuse_errors(problems)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a: [", r"wrong.yaml: line 1, column 5"),
        ("just text", "no Kubernetes manifest there"),
        ("", "no Kubernetes manifest there"),
    ],
)
def test_a_file_that_is_no_manifest(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=says):
        manifests.read([path])


def test_a_missing_file_and_a_wrong_crd_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file"):
        manifests.read([tmp_path / "nowhere.yaml"])
    (tmp_path / "crd.yaml").write_text("kind: CustomResourceDefinition\nspec: {versions: []}\n")
    with pytest.raises(ConfigError, match=r"crd.yaml: not the CRD of ray.io/v1 RayService"):
        schema.load_crd(tmp_path / "crd.yaml")
