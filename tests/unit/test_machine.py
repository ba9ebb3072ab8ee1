"""What nvidia-smi and the kernel say, read as hardware."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen_ray import machine


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("NVIDIA H100 80GB HBM3, 81559", "H100-80G"),
        ("NVIDIA H200, 143771", "H200-141G"),
        ("NVIDIA A100-SXM4-40GB, 40960", "A100-40G"),
        ("NVIDIA L4, 23034", "L4-24G"),
        ("Tesla T4, 15360", "T4-16G"),
        ("NVIDIA GeForce RTX 4090, 24564", "RTX4090-24G"),
    ],
)
def test_gpus_are_found_in_the_table(line: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{line}'\necho '{line}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    gpus = machine.this_machine().nodes[0]
    assert (gpus.num_devices, gpus.device.name, gpus.device.kind) == (2, name, "cuda")


def test_a_gpu_out_of_the_table_counts_with_its_own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA Future 9000, 10240'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert machine.this_machine().nodes[0].device.memory_bytes == 10 * 2**30


def test_a_containers_limits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("1073741824\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    monkeypatch.setattr(machine, "_CGROUP_MEMORY", tmp_path / "memory.max")
    monkeypatch.setattr(machine, "_CGROUP_CPU", tmp_path / "cpu.max")
    monkeypatch.setenv("PATH", str(tmp_path))
    (cpu,) = machine.this_machine().nodes
    assert (cpu.device.memory_bytes, cpu.num_cores) == (2**30, 1)
