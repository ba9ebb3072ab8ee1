"""What a user calls a model → where its files lie. Fetches what is not there; opens nothing."""

from __future__ import annotations

import re
from pathlib import Path

from qwen_ray.core.errors import SourceError
from qwen_ray.source import demo, hub
from qwen_ray.source.progress import Progress

_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(source: str, cache_dir: Path, *, revision: str | None = None, on_progress: Progress | None = None) -> Path:
    """The directory or .gguf file of `source`: `demo`, a directory, a .gguf file, or a Hugging Face id.

    A path that exists goes before an id of the same spelling; write ./demo for a directory of that name. `revision` is
    for ids only. Raises SourceError: what was looked for, where, and what to do.
    """
    if source == "demo":
        return demo.pull(cache_dir, on_progress)
    path = _local(source)
    return path if path is not None else hub.fetch(source, cache_dir, revision=revision, on_progress=on_progress)


def present(source: str, cache_dir: Path, *, revision: str | None = None) -> Path | None:
    """As `resolve`, without fetching anything: None for what is not here. Raises SourceError for what is nowhere."""
    if source == "demo":
        return demo.present(cache_dir)
    path = _local(source)
    return path if path is not None else hub.present(source, cache_dir, revision=revision)


def _local(source: str) -> Path | None:
    """Of a path; None for an id. Raises SourceError for what is neither."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _directory(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise SourceError(f"{path} is a file, but no .gguf; give the directory that holds config.json.")
        return path.absolute()
    looks_like_path = source.startswith((".", "/", "~")) or source.endswith((".gguf", ".safetensors", "/"))
    if looks_like_path or not _MODEL_ID.fullmatch(source):
        hint = "" if looks_like_path else " It is no Hugging Face id (OWNER/NAME) either, and not `demo`."
        raise SourceError(f"{source!r}: no such directory or file (looked in {Path.cwd()}).{hint}")
    return None


def _directory(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path.absolute()
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0].absolute()
    held = f"it holds {len(files)} .gguf files, give one of them" if files else "it holds no .gguf file either"
    raise SourceError(f"{path}: a model's directory needs config.json, which is missing; {held}.")
