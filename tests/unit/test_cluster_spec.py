"""Which difference of two cluster specs makes a new cluster (kuberay.live.cluster_spec)."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from serve_app.kuberay.live.cluster_spec import appended, differences, same


def spec() -> dict[str, Any]:
    resources = {"requests": {"cpu": "0.5", "memory": "1024Mi"}, "limits": {"memory": "1Gi"}}
    container = {"name": "ray", "image": "a:1", "resources": resources}
    pod = {"containers": [container], "volumes": [{"emptyDir": {"sizeLimit": "2048Mi"}}]}
    group = {"groupName": "g", "minReplicas": 1, "maxReplicas": 2, "template": {"spec": pod}}
    return {"headGroupSpec": {"template": {"spec": {}}}, "workerGroupSpecs": [group]}


def test_what_the_operator_writes_back_is_the_same() -> None:
    """Empty structs, and amounts in the words of its own type."""
    after = copy.deepcopy(spec())
    group = after["workerGroupSpecs"][0]
    group |= {"scaleStrategy": {}, "replicas": 3, "minReplicas": 2, "maxReplicas": 5}
    pod = group["template"]["spec"]
    pod["containers"][0]["resources"]["requests"] = {"cpu": "500m", "memory": "1Gi"}
    pod["volumes"][0]["emptyDir"]["sizeLimit"] = "2Gi"
    pod["tolerations"] = [{"key": "a"}]
    after["headGroupSpec"]["template"]["metadata"] = {}
    assert same(after, spec())
    assert list(differences(after, spec())) == []


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (("containers", 0, "image"), "a:2", "containers[0].image a:1 → a:2"),
        (
            ("containers", 0, "resources", "requests", "cpu"),
            "1",
            "containers[0].resources.requests.cpu 0.5 → 1",
        ),
        (("volumes", 0, "emptyDir", "sizeLimit"), "3Gi", "emptyDir.sizeLimit 2048Mi → 3Gi"),
    ],
)
def test_what_differs_is_told_in_its_own_words(path: Any, value: str, line: str) -> None:
    after = spec()
    at: Any = after["workerGroupSpecs"][0]["template"]["spec"]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert not same(spec(), after)
    (told,) = differences(spec(), after)
    assert told.endswith(line)


def test_an_amount_is_compared_as_one_only_where_kubernetes_has_amounts() -> None:
    before, after = spec(), spec()
    for document, value in ((before, "1000m"), (after, "1")):
        container = document["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
        container["env"] = [{"name": "THREADS", "value": value}]
    assert not same(before, after)


def test_groups_appended_at_the_end_only_make_no_new_cluster() -> None:
    more = spec()["workerGroupSpecs"][0] | {"groupName": "h"}
    assert appended(spec(), spec() | {"workerGroupSpecs": [*spec()["workerGroupSpecs"], more]}) == [
        "h"
    ]
    first = spec() | {"workerGroupSpecs": [more, *spec()["workerGroupSpecs"]]}
    assert appended(spec(), first) is None
    assert list(differences(spec(), first)) == ["worker group 'h' is added"]
