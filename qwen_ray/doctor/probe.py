"""One node looks at itself, in a process of its own: what hangs or crashes takes nobody along.

    python -m qwen_ray.doctor.probe        a Question (JSON) on stdin; on stdout a JSON line for each finding

The first line is `{"facts": {...}}`: what only means something beside other nodes. `examine` is the other end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

from qwen_ray.doctor.checks import CHECKS, Question
from qwen_ray.doctor.finding import Finding, guarded

CHECK_SECONDS = 100.0
PROBE_SECONDS = 120.0
PACKAGES = ("qwen-ray", "torch", "ray")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """`versions` is empty where the node did not say."""

    findings: tuple[Finding, ...]
    versions: dict[str, str]


def examine(question: Question, python: str = sys.executable) -> NodeReport:
    """This node's report, in PROBE_SECONDS at most."""
    command = [python, "-m", "qwen_ray.doctor.probe"]
    asked = json.dumps(asdict(question))
    broken = ""
    try:
        answer = subprocess.run(
            command, input=asked, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
        said = answer.stdout
        if answer.returncode != 0:
            last = (answer.stderr.strip().splitlines() or [""])[-1]
            broken = f"the process that looks at this node ended with {answer.returncode}: {last[:300]}"
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        broken = f"the process that looks at this node did not end within {PROBE_SECONDS:.0f} s"
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    findings = [Finding(**line["finding"]) for line in lines if "finding" in line]
    if broken:
        advice = 'Run `python -m qwen_ray.doctor.probe <<< \'{"cache_dir": "/tmp"}\'` on it.'
        findings.append(Finding(check="node", verdict="fail", message=broken, advice=advice))
    facts = next((line["facts"] for line in lines if "facts" in line), {})
    return NodeReport(findings=tuple(findings), versions=facts.get("versions", {}))


def now() -> float:
    """This node's clock."""
    return time.time()


def versions() -> dict[str, str]:
    found = {"python": python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def main() -> None:
    question = Question(**json.loads(sys.stdin.read()))
    _say({"facts": {"versions": versions()}})

    def run(name: str) -> None:
        for finding in guarded(name, CHECK_SECONDS, partial(CHECKS[name], question)):
            _say({"finding": asdict(finding)})

    with ThreadPoolExecutor(len(CHECKS)) as beside:
        list(beside.map(run, CHECKS))
    os._exit(0)  # whatever a check that hangs still holds


def _say(line: object) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
