"""Clients, each in an environment of its own: together they would hold each other at old versions. Not a test.

    python tests/clients/environments.py [NAME ...]        makes them ahead of time; a second time it does nothing

The versions that are run stand here, and in the README's table. Environments lie under ~/.cache/qwen-ray/clients.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path("~/.cache/qwen-ray/clients").expanduser()

PYTHON: dict[str, tuple[str, ...]] = {
    "openai": ("openai==3.54.0",),
    "langchain-openai": ("langchain-openai==1.7.3",),
    "litellm": ("litellm==1.106.2", "mcp==2.3.0"),
    "instructor": ("instructor==1.17.0",),
    "qwen-agent": ("qwen-agent==0.0.34", "python-dateutil==4.0.0", "soundfile==0.14.0", "tqdm==4.70.1"),
    "llm-comply": ("llm-comply==0.5.0",),
    "lm-eval": ("lm-eval[api]==0.4.13",),
    "schemathesis": ("schemathesis==4.32.5",),
}
NODE: dict[str, tuple[str, ...]] = {
    "openai-node": ("openai@7.57.0",),
    "ai-sdk": ("ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92", "zod@4.6.7"),
}


def environment(name: str) -> Path:
    """Its folder, made if need be: under `bin` are a Python client's programs, under `node_modules` a Node client's."""
    packages = PYTHON.get(name) or NODE[name]
    folder = FOLDER / f"{name}-{hashlib.sha256(' '.join(packages).encode()).hexdigest()[:8]}"
    stamp = folder / ".installed"
    if stamp.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    if name in PYTHON:
        _run(sys.executable, "-m", "venv", str(folder))
        _run(str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q", *packages)
    else:
        if shutil.which("npm") is None:
            raise RuntimeError(f"{name} needs npm: apt-get install npm (Debian)")
        folder.mkdir(parents=True)
        _run("npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", str(folder), *packages)
    stamp.touch()
    return folder


def python(name: str) -> str:
    return str(environment(name) / "bin" / "python")


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    for one in sys.argv[1:] or [*PYTHON, *NODE]:
        sys.stdout.write(f"{environment(one)}\n")
