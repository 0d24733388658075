"""GPUs as the driver's tool lists them, and the memory that a cgroup leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serve_app.errors import UserError
from serve_app.local import this_machine
from serve_app.local.this_machine import gpus_in

# Recorded on a machine with two H100 (driver 580).
TWO_H100 = """\
0, GPU-88da9844-5c38-cf54-c023-b888d39527e0, NVIDIA H100 80GB HBM3, 81559, 9.0
1, GPU-1da8ba88-3433-5e87-8154-6eb0683428bb, NVIDIA H100 80GB HBM3, 81559, 9.0
"""


def listed(name: str, mib: int, capability: str) -> str:
    return f"0, GPU-0, {name}, {mib}, {capability}\n"


@pytest.mark.parametrize(
    ("listing", "names"),
    [
        (TWO_H100, ["H100", "H100"]),
        ("", []),
        (listed("NVIDIA A100-SXM4-40GB", 40960, "8.0"), ["A100-40G"]),
        (listed("NVIDIA A100 80GB PCIe", 81920, "8.0"), ["A100-80G"]),
        (listed("NVIDIA L4", 23034, "8.9"), ["L4"]),
        (listed("NVIDIA L40S", 46068, "8.9"), ["L40S"]),
        (listed("NVIDIA H200", 143771, "9.0"), ["H200"]),
        (listed("NVIDIA B200", 183359, "10.0"), ["B200"]),
        (listed("Tesla T4", 15360, "7.5"), ["T4"]),
        (listed("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887, "12.0"), ["RTX-PRO-6000"]),
    ],
)
def test_the_planner_s_gpus_are_recognized(listing: str, names: list[str]) -> None:
    assert [gpu.name for gpu in gpus_in(listing, None)] == names


@pytest.mark.parametrize(
    ("name", "mib", "capability", "called"),
    [
        ("NVIDIA GeForce RTX 4090", 24564, "8.9", "RTX 4090"),
        ("Tesla V100-SXM2-16GB", 16384, "7.0", "Tesla V100-SXM2-16GB"),  # the planner's has 32
        ("NVIDIA H100 NVL", 95830, "9.0", "H100 NVL"),
    ],
)
def test_others_are_what_the_driver_says(name: str, mib: int, capability: str, called: str) -> None:
    [gpu] = gpus_in(listed(name, mib, capability), None)
    assert (gpu.name, gpu.capability) == (called, round(10 * float(capability)))
    assert 0.9 * mib < gpu.memory_bytes / (1 << 20) < mib


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 2),
        ("0,1", 2),
        ("1", 1),
        ("GPU-1da8ba88", 1),
        ("", 0),
        ("-1", 0),
        ("0,-1,1", 1),
        ("7", 0),
    ],
)
def test_cuda_visible_devices_counts(visible: str | None, count: int) -> None:
    assert len(gpus_in(TWO_H100, visible)) == count


def test_a_gpu_without_memory_of_its_own_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"does not tell the memory of GPU 0 \(NVIDIA GB10\)"):
        gpus_in("0, GPU-0, NVIDIA GB10, [N/A], 12.1\n", None)


def tool(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an ``nvidia-smi`` of this content first in PATH."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_tool_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "answer").write_text(TWO_H100)
    asked = '[ "$1" = --query-gpu=index,uuid,name,memory.total,compute_cap ] || exit 2'
    tool(tmp_path, f"{asked}\ncat {tmp_path}/answer", monkeypatch)
    machine = this_machine.look()
    assert [gpu.name for gpu in machine.gpus] == ["H100", "H100"]
    assert machine.cores >= 1
    assert machine.free_memory_bytes > 0


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo No devices were found; exit 6", None),
        (
            "echo 'NVIDIA-SMI has failed because it could not communicate with the driver.'; "
            "exit 9",
            "nvidia-smi fails (NVIDIA-SMI has failed because it could not communicate with the "
            "driver); mend the GPU's driver",
        ),
    ],
)
def test_a_driver_that_fails_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, told: str | None
) -> None:
    tool(tmp_path, script, monkeypatch)
    if told is None:
        assert this_machine.look().gpus == ()
        return
    with pytest.raises(UserError) as caught:
        this_machine.look()
    assert str(caught.value) == told


def test_a_cgroup_s_limit_counts_without_files_that_can_go(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 300\nactive_file 100\n")
    assert this_machine._held(tmp_path) == 700


def test_what_is_free_is_part_of_what_there_is() -> None:
    assert 0 < this_machine.free_memory_bytes() < this_machine.memory_bytes()
