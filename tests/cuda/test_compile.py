"""Triton's kernels compile for GPUs, keep to their registers and to the shared memory there is. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parent / "compile_kernels.py"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that a block can have


def test_every_kernel_compiles_and_fits() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {compiled["capability"] for compiled in found} == set(SHARED_BYTES)
    too_large = [c for c in found if c["spilled_bytes"] or c["shared_bytes"] > SHARED_BYTES[c["capability"]]]
    assert too_large == []
