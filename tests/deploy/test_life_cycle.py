"""A release from its installation to its end, with a real helm and an emulated API server (`make test-deploy`)."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from charts import CHART, READY
from emulated import Server, api_server, kubeconfig, postgresql

pytestmark = pytest.mark.deploy
Helm = Callable[..., str]
FLAGS = ("--server-side=false", "--disable-openapi-validation", "--skip-crds")


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="qr-pg-") as folder, postgresql(Path(folder)) as address:
        yield address


@pytest.fixture
def server() -> Iterator[Server]:
    with api_server() as running:
        yield running


@pytest.fixture
def run(helm: str, database: str, server: Server, tmp_path: Path) -> Helm:
    """helm with these arguments; what it prints. Fails the test where helm fails."""
    environment = {
        **os.environ,
        "HELM_DRIVER": "sql",
        "HELM_DRIVER_SQL_CONNECTION_STRING": database,
        "KUBECONFIG": str(kubeconfig(server.url, tmp_path / "kubeconfig")),
    }

    def run(*arguments: str) -> str:
        done = subprocess.run([helm, *arguments], capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def settings(server: Server, name: str) -> Any:
    spec = server.get("RayService", name)["spec"]
    return yaml.safe_load(spec["serveConfigV2"])["applications"][0]["args"]


def test_install_upgrade_roll_back_uninstall(run: Helm, server: Server) -> None:
    name = "life"
    values = ("-f", str(CHART / "values-laptop.yaml"))
    assert "STATUS: deployed" in run("install", name, str(CHART), *FLAGS, *values)
    assert server.names("RayService") == ["life-qwen-ray"]
    assert server.names("PodDisruptionBudget") == server.names("NetworkPolicy") == ["life-qwen-ray"]
    assert server.names("Pod") == []  # the test's, which is a hook
    assert settings(server, "life-qwen-ray")["engine"]["max_num_seqs"] == 16

    upgraded = ("--set", "engine.max_num_seqs=32", "--set", "networkPolicy.enabled=false")
    run("upgrade", name, str(CHART), "--server-side=false", *FLAGS[1:], *values, *upgraded)
    assert settings(server, "life-qwen-ray")["engine"]["max_num_seqs"] == 32
    assert server.names("NetworkPolicy") == []

    history = json.loads(run("history", name, "-o", "json"))
    assert [(one["revision"], one["status"]) for one in history] == [(1, "superseded"), (2, "deployed")]
    run("rollback", name, "1", "--server-side=false")
    assert settings(server, "life-qwen-ray")["engine"]["max_num_seqs"] == 16
    assert server.names("NetworkPolicy") == ["life-qwen-ray"]

    run("uninstall", name)
    for kind in ("RayService", "ConfigMap", "PodDisruptionBudget", "NetworkPolicy"):
        assert server.names(kind) == []
    assert json.loads(run("list", "-o", "json")) == []


@pytest.mark.parametrize("ready", READY)
def test_every_ready_values_file_installs(run: Helm, server: Server, ready: str) -> None:
    run("install", ready, str(CHART), *FLAGS, "-f", str(CHART / f"values-{ready}.yaml"))
    (name,) = server.names("RayService")
    claims = server.names("PersistentVolumeClaim")
    assert claims == ([] if ready == "laptop" else [f"{name}-weights"])
    run("uninstall", ready)
    assert server.names("RayService") == []
    assert server.names("PersistentVolumeClaim") == claims  # weights are kept


def test_two_releases_live_beside_each_other(run: Helm, server: Server) -> None:
    for name in ("first", "second"):
        run("install", name, str(CHART), *FLAGS, "-f", str(CHART / "values-laptop.yaml"))
    assert server.names("RayService") == ["first-qwen-ray", "second-qwen-ray"]
    run("uninstall", "first")
    assert server.names("RayService") == ["second-qwen-ray"]
    run("uninstall", "second")
