"""A Prometheus of our own with the configuration that we ship, and what it answers. Not a test."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_tools import OBSERVABILITY, tool

from qwen_ray.commands.ports import free_ports

SHIPPED_ADDRESS = "127.0.0.1:8000"
START_SECONDS = 60
INTERVAL = 5  # seconds between two scrapes, and for each of them: a busy machine may need them
# Of what Grafana puts in: the window of rates, and every value of each variable.
VARIABLES = {"$__rate_interval": "2m", "$model_name": ".*", "$ingress": ".*", "$replica": ".*"}


class Prometheus:
    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=30)

    def get(self, path: str, **parameters: str | float) -> Any:
        answer = self.client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def samples(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Now: labels and value of each series, NaN left out."""
        data = self.get("query", query=substituted(expression))
        found = [data["result"]] if data["resultType"] == "scalar" else data["result"]
        rows = [(row["metric"], float(row["value"][1])) for row in found]
        return [(labels, value) for labels, value in rows if value == value]

    def lines(self, expression: str, legend: str, seconds: float) -> list[dict[str, Any]]:
        """Of the last `seconds`, as the page draws them."""
        now = time.time()
        data = self.get("query_range", query=substituted(expression), start=now - seconds, end=now, step=INTERVAL)
        found = [
            {
                "legend": re.sub(r"\{\{(\w+)\}\}", lambda match, m=row["metric"]: m.get(match[1], ""), legend),
                "values": [[at, float(value)] for at, value in row["values"] if value != "NaN"],
            }
            for row in data["result"]
        ]
        return [line for line in found if line["values"]]

    def until(self, expression: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.samples(expression):
            assert time.monotonic() < deadline, f"{expression} has no data after {seconds} s"
            time.sleep(0.5)


def substituted(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


@contextmanager
def prometheus(folder: Path, config: str, server: str) -> Iterator[Prometheus]:
    """With `observability/prometheus/CONFIG`: the server's address and the intervals are ours, nothing else."""
    text = (OBSERVABILITY / "prometheus" / config).read_text()
    text = text.replace(SHIPPED_ADDRESS, server.removeprefix("http://")).replace("15s", f"{INTERVAL}s")
    shipped = yaml.safe_load(text)
    shipped["rule_files"] = [str(OBSERVABILITY / "prometheus" / each) for each in shipped["rule_files"]]
    folder.mkdir()
    (folder / config).write_text(yaml.safe_dump(shipped))
    (port,) = free_ports(1)
    options = [f"--config.file={folder / config}", f"--storage.tsdb.path={folder / 'data'}"]
    command = [tool("prometheus"), *options, f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while not _is_ready(url):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, f"Prometheus is not ready in {START_SECONDS} s"
            time.sleep(0.2)
        found = Prometheus(url)
        with found.client:
            yield found
    finally:
        process.terminate()
        process.communicate(timeout=30)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
