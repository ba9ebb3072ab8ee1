"""Dockerfiles, the unit for systemd and the file for Ray's cluster launcher, by their own checkers."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from charts import CHART, ROOT
from image_steps import instructions

from qwen_ray.serving.environment import ENVIRONMENT

DEPLOY = ROOT / "deploy"
DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_is_content(name: str) -> None:
    program = str(Path(sys.executable).parent / "hadolint")
    done = subprocess.run([program, str(DEPLOY / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_are_pinned_and_not_root(name: str) -> None:
    steps = instructions((DEPLOY / name).read_text(encoding="utf-8"))
    bases = [rest.split()[0] for kind, rest in steps if kind == "FROM"]
    assert len(bases) == 2
    assert all(re.fullmatch(r"debian:\d+\.\d+-slim", base) for base in bases)
    assert [rest for kind, rest in steps if kind == "USER"] == ["1000"]
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert any(kind == "RUN" and torch in rest.split() for kind, rest in steps)
    sent = (ROOT / ".dockerignore").read_text().split()
    for kind, rest in steps:
        if kind == "COPY" and not rest.startswith("--from"):
            assert all(f"!{source}" in sent and (ROOT / source).exists() for source in rest.split()[:-1])


def test_tags_are_those_of_the_ready_values() -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    built = {re.search(r"-t qwen-ray:(\S+)", (DEPLOY / name).read_text())[1] for name in DOCKERFILES}  # type: ignore[index]
    assert built == {f"{version}-cpu", f"{version}-cuda"}
    for file in CHART.glob("values-*.yaml"):
        assert yaml.safe_load(file.read_text())["image"]["tag"] in built


def test_the_launcher_takes_the_cluster() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.autoscaler._private.util import prepare_config, validate_config
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
    prepared = prepare_config(config)  # as `ray up` does
    validate_config(prepared)
    assert prepared["available_node_types"]["local.cluster.node"]["max_workers"] == 2


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_the_launcher_gives_ray_our_environment(key: str) -> None:
    start = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())[key][-1]
    words = shlex.split(start.partition("export ")[2].partition(";")[0])
    assert dict(word.split("=", 1) for word in words) == ENVIRONMENT


def test_the_unit_is_one(tmp_path: Path) -> None:
    text = (DEPLOY / "qwen-ray.service").read_text()
    sections = re.findall(r"^\[(\w+)\]$", text, re.MULTILINE)
    assert sections == ["Unit", "Service", "Install"]
    program = shutil.which("systemd-analyze")
    if program is None:  # a machine without systemd has nothing to run it with either
        return
    unit = tmp_path / "qwen-ray.service"
    unit.write_text(text.replace("/opt/qwen-ray/bin/qwen-ray", "/bin/true"))
    done = subprocess.run([program, "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
