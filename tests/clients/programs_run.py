"""A client's program, run to its end; it must end well. Not a test."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SECONDS = 900
# Nothing is fetched from a hub, and nobody is told of anything.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "DO_NOT_TRACK": "1",
    "OPENAI_API_KEY": "none",
}


def run(*command: str, cwd: Path | None = None) -> str:
    """What it says."""
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment, cwd=cwd
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return done.stdout
