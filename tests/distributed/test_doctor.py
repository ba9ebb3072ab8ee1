"""`qwen-ray doctor` as it is typed, on a machine with five things wrong: each has its line, and others are content."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

DRIVER = """#!/bin/sh
case "$1" in -L) echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)";; *) echo "NVIDIA H100 80GB HBM3, 81559";; esac
"""


def test_planted_faults_are_found(tmp_path: Path) -> None:
    # A copy of the package in which no kernels have been built, and a home that has none either.
    shutil.copytree(ROOT / "qwen_ray", tmp_path / "qwen_ray", ignore=shutil.ignore_patterns("built", "__pycache__"))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "nvidia-smi").write_text(DRIVER)
    (programs / "nvidia-smi").chmod(0o700)
    for name in ("sh", "mount", "unshare"):
        (programs / name).symlink_to(shutil.which(name) or name)
    environment = {**os.environ, "PATH": str(programs), "HOME": str(tmp_path / "home")}
    (tmp_path / "file").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [
            *("unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=16m tmpfs /dev/shm && exec "$@"', "sh"),
            *(sys.executable, "-m", "qwen_ray.cli", "doctor", "Qwen/Qwen2.5-72B-Instruct", "--json"),
            *("--port", str(port), "--cache-dir", str(tmp_path / "file" / "cache")),
        ]
        answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 1, answer.stderr
    shown = json.loads(answer.stdout)
    assert shown["verdict"] == "fail"
    found = {finding["check"]: finding for finding in shown["findings"] if finding["verdict"] != "ok"}
    assert set(found) == {"ports", "disk", "shared memory", "gpus", "kernels", "memory"}
    assert all(finding["advice"] for finding in found.values())
    content = {finding["check"] for finding in shown["findings"] if finding["verdict"] == "ok"}
    assert content == {"versions", "network", "haproxy"}
