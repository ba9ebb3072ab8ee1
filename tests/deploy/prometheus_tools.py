"""Debian's Prometheus, and where what we ship for it lies. Not a test."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
OBSERVABILITY = ROOT / "observability"
RULES = sorted((OBSERVABILITY / "prometheus" / "rules").glob("*.yaml"))
PACKAGES = {
    "promtool": "prometheus",
    "prometheus": "prometheus",
    "amtool": "prometheus-alertmanager",
    "chromium": "chromium",
}


def tool(name: str) -> str:
    """Its path. Fails, saying how to install it, where it is missing."""
    found = shutil.which(name)
    assert found, f"{name} is missing: apt-get install --no-install-recommends {PACKAGES[name]}"
    return found


def checked(name: str, *arguments: str | Path) -> str:
    """What it prints; fails with it when it fails."""
    done = subprocess.run([tool(name), *map(str, arguments)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
