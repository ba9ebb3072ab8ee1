"""Environments of Python, one for each peer, from a list of exact versions: `pins/NAME.txt`, dependencies included.

Nothing is resolved: what a peer's metadata ask for beside (vision, audio) and cannot be had for CPUs is left out. An
environment whose list has changed is made anew. Where PyPI's torch would be the CUDA build, give pip the index of CPU
builds (`PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu`).
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

from benchmarks.peers import place


def make(peer: str, log: IO[bytes]) -> Path:
    """Its Python, installed now where it is missing."""
    pins = place.PINS / f"{peer}.txt"
    target = place.environment(peer)
    stamp = target / "installed.txt"
    if not stamp.exists() or stamp.read_text() != pins.read_text():
        # A base interpreter, not ours: an environment must not see another's packages.
        place.run(["python3.11", "-m", "venv", "--clear", target], log=log)
        pip = [target / "bin/python", "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
        place.run([*pip, "-r", pins], log=log)
        stamp.write_text(pins.read_text())
    return python(peer)


def python(peer: str) -> Path:
    return place.environment(peer) / "bin/python"


def pinned(peer: str, package: str) -> str:
    """The version of `package` in its list."""
    for line in (place.PINS / f"{peer}.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if name.lower() == package:
            return version
    raise LookupError(f"{peer}.txt does not pin {package}")
