"""Where everything lies that a run needs and git does not keep: checkpoints, environments, sources, logs.

Knows names under one folder of the cache, and how to run a command that must succeed. Nothing of what the commands do.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import IO

ROOT = Path(__file__).resolve().parents[2]  # of the repository
PINS = Path(__file__).parent / "pins"
BENCH = Path("~/.cache/qwen-ray/bench").expanduser()


def checkpoint(model: str) -> Path:
    """The folder of a model's bf16 checkpoint."""
    return BENCH / "models" / model / "bf16"


def converted(model: str, name: str) -> Path:
    """A peer's own form of a model: a folder or a file."""
    return BENCH / "models" / model / name


def environment(peer: str) -> Path:
    return BENCH / "env" / peer


def log_file(name: str) -> Path:
    path = BENCH / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """A path to make `target` at; it takes its place when the block ends well, so what exists is whole."""
    partial = target.with_name(target.name + ".partial")
    if partial.is_dir():
        rmtree(partial)
    partial.unlink(missing_ok=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    partial.rename(target)


def run(arguments: Sequence[str | Path], *, log: IO[bytes], cwd: Path | None = None, **environ: str) -> None:
    """Raises RuntimeError that names the log when the command fails."""
    words = [str(argument) for argument in arguments]
    log.write(f"$ {' '.join(words)}\n".encode())
    log.flush()
    merged: Mapping[str, str] = {**os.environ, **environ}
    if subprocess.run(words, cwd=cwd, env=merged, stdout=log, stderr=log, stdin=subprocess.DEVNULL).returncode:
        raise RuntimeError(f"{' '.join(words[:4])} … failed; see {log.name}")
