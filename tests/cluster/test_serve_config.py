"""The chart's serveConfigV2, as it is rendered, brought to a real Ray in KubeRay's way: it serves the demo model."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from served import Answer, check_answers, is_ready

from qwen_ray.commands.haproxy import in_front
from qwen_ray.commands.ports import free_ports
from qwen_ray.commands.process_tree import descendants
from qwen_ray.config import Settings
from qwen_ray.serving.environment import ENVIRONMENT

pytestmark = pytest.mark.deploy

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
CHART = ROOT / "helm" / "qwen-ray"
DEPLOY_SECONDS = 480
END_SECONDS = 60  # in which Ray's processes notice that theirs are gone
AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}


@contextmanager
def ray_with_dashboard(settings: Settings) -> Iterator[str]:
    """Its dashboard's address. Afterwards nothing is left of it."""
    with in_front(settings) as (_, proxy):
        environment = {**os.environ, **ENVIRONMENT, **proxy, **AUTH, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, str(FOLDER / "deployed_by_config.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            assert address, "Ray did not start"
            yield address
            started = descendants(process.pid)
            process.communicate(timeout=60)
            deadline = time.monotonic() + END_SECONDS
            while left := [pid for pid in started if Path(f"/proc/{pid}").exists()]:
                assert time.monotonic() < deadline, left
                time.sleep(0.5)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()


def applications(dashboard: str, config: dict[str, Any] | None = None) -> httpx.Response:
    """What is deployed; or have `config` deployed."""
    headers = {"Authorization": f"Bearer {AUTH['RAY_AUTH_TOKEN']}"}
    method = "GET" if config is None else "PUT"
    url = f"{dashboard}/api/serve/applications/"
    return httpx.request(method, url, headers=headers, json=config, timeout=60)


def status(dashboard: str) -> dict[str, Any]:
    return applications(dashboard).json()["applications"]


def test_the_charts_serve_config_serves_the_demo_model(answers_of_demo: list[Answer]) -> None:
    sys.path.insert(0, str(FOLDER.parent / "deploy"))
    from tools import helm

    (port,) = free_ports(1)
    cache = Path("~/.cache/qwen-ray").expanduser()
    here = ["--set", f"http.port={port}", "--set", f"cache_dir={cache}"]  # of a pod they are 8000 and /weights
    command = [helm(), "template", "qwen", str(CHART), "-f", str(CHART / "values-laptop.yaml"), *here]
    rendered = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (service,) = [one for one in yaml.safe_load_all(rendered) if one and one["kind"] == "RayService"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    settings = Settings.from_dict(config["applications"][0]["args"])
    with ray_with_dashboard(settings) as dashboard:
        answer = applications(dashboard, config)
        assert answer.status_code == 200, answer.text
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + DEPLOY_SECONDS
        while not (status(dashboard).get("qwen-ray", {}).get("status") == "RUNNING" and is_ready(url)):
            assert time.monotonic() < deadline, status(dashboard)
            time.sleep(1)
        assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == ["demo"]
        check_answers(url, "demo", answers_of_demo[:4])
