"""A model from the Hugging Face Hub, in the cache directory. What lies there is used without a question to the network.

Takes weights in safetensors, configurations and tokenizer files; never pickles, never code. The Hub's telemetry is off.
"""

from __future__ import annotations

import json
import threading
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import disable_progress_bars

from qwen_ray.core.errors import SourceError
from qwen_ray.source.progress import POLL_SECONDS, Progress, folder_bytes

_WANTED = ["*.safetensors", "*.json", "*.jinja", "merges.txt"]
# Of folders, only those of sentence-transformers' modules are looked into: 1_Pooling and the like.
_UNWANTED = ["*/*.safetensors", "[!0-9]*/*.json", "consolidated*"]


def fetch(
    model_id: str,
    cache_dir: Path,
    *,
    revision: str | None = None,
    on_progress: Progress | None = None,
    endpoint: str | None = None,
) -> Path:
    """The directory of `model_id` (OWNER/NAME): from `cache_dir/hub`, the Hub's own cache, or the network.

    A copy that is complete is never updated; a `revision` (branch, tag, commit) that is not cached is fetched.
    `endpoint` is by default what huggingface_hub was told (HF_ENDPOINT). Raises SourceError.
    """
    folder = present(model_id, cache_dir, revision=revision)
    if folder is not None:
        return folder
    own = cache_dir / "hub"
    endpoint = endpoint or constants.ENDPOINT
    constants.HF_HUB_DISABLE_TELEMETRY = True  # what HF_HUB_DISABLE_TELEMETRY=1 does, for this process
    disable_progress_bars()
    stop = threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(model_id, own, revision, endpoint, on_progress, stop), name="hub-progress", daemon=True
    )
    watcher.start()
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                model_id,
                revision=revision,
                cache_dir=own,
                endpoint=endpoint,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
            )
        )
    except Exception as error:  # the library's, its HTTP client's, the file system's
        raise SourceError(_advice(model_id, own, revision, endpoint, error)) from error
    finally:
        stop.set()
        watcher.join(timeout=1.0)
    missing = missing_files(folder)
    if missing:
        raise SourceError(f"{model_id} on {endpoint} has no {missing}; needed are config.json and *.safetensors.")
    return folder


def present(model_id: str, cache_dir: Path, *, revision: str | None = None) -> Path | None:
    """The complete copy in `cache_dir/hub` or the Hub's own cache, or None. Touches no network."""
    caches = cache_dir / "hub", Path(constants.HF_HUB_CACHE)
    return next((found for cache in caches if (found := cached(model_id, cache, revision=revision))), None)


def cached(model_id: str, cache: Path, *, revision: str | None = None) -> Path | None:
    """The complete copy in `cache`, or None. Touches no network."""
    try:
        found = huggingface_hub.snapshot_download(
            model_id,
            revision=revision,
            cache_dir=cache,
            local_files_only=True,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
        )
    except (OSError, ValueError):
        return None
    return None if missing_files(Path(found)) else Path(found)


def missing_files(folder: Path) -> str | None:
    """The first file that a model in `folder` lacks, by its own index; None if it is whole."""
    if not (folder / "config.json").is_file():
        return "config.json"
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return _missing_pooling(folder) if any(folder.glob("*.safetensors")) else "*.safetensors"
    try:
        shards: set[str] = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        return f"readable {index.name}"
    missing = next((name for name in sorted(shards) if not (folder / name).is_file()), None)
    return missing or _missing_pooling(folder)


def _missing_pooling(folder: Path) -> str | None:
    """How an embedding model pools: copies that others have made, of weights alone, do not say it."""
    modules = folder / "modules.json"
    if not modules.is_file():
        return None
    try:
        listed = json.loads(modules.read_text(encoding="utf-8"))
        paths = [str(module["path"]) for module in listed if str(module["type"]).endswith(".Pooling")]
    except (ValueError, KeyError, TypeError):
        return f"readable {modules.name}"
    return next((f"{path}/config.json" for path in paths if not (folder / path / "config.json").is_file()), None)


def _watch(
    model_id: str,
    cache: Path,
    revision: str | None,
    endpoint: str,
    on_progress: Progress | None,
    stop: threading.Event,
) -> None:
    if on_progress is None:
        return
    total = _total_bytes(model_id, revision, endpoint)
    blobs = cache / ("models--" + model_id.replace("/", "--")) / "blobs"
    while not stop.wait(POLL_SECONDS):
        on_progress(min(folder_bytes(blobs), total), total, f"download {model_id}")


def _total_bytes(model_id: str, revision: str | None, endpoint: str) -> int:
    try:
        info = huggingface_hub.HfApi(endpoint=endpoint).model_info(model_id, revision=revision, files_metadata=True)
    except Exception:  # only a bar's length; the download itself reports what is wrong
        return 0
    files = [file for file in info.siblings or [] if _is_wanted(file.rfilename)]
    return sum(file.size or 0 for file in files)


def _is_wanted(name: str) -> bool:
    return any(fnmatch(name, p) for p in _WANTED) and not any(fnmatch(name, p) for p in _UNWANTED)


def _advice(model_id: str, cache: Path, revision: str | None, endpoint: str, error: Exception) -> str:
    if isinstance(error, RevisionNotFoundError):
        return f"{model_id} on {endpoint} has no revision {revision!r}."
    if isinstance(error, GatedRepoError):
        return (
            f"{model_id} on {endpoint} is gated: accept its terms there, then log in with `hf auth login` or HF_TOKEN."
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"{model_id} does not exist on {endpoint}, or is private: check the name, or log in with HF_TOKEN."
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return (
        f"the model {model_id!r} could not be fetched ({reason}).\n"
        f"  Looked for: a copy in {cache} and in {constants.HF_HUB_CACHE} (none complete), then {endpoint}.\n"
        f"  What to do: connect to the network or set HF_ENDPOINT to a mirror;\n"
        f"  or run `qwen-ray pull {model_id}` on a machine with a network and copy {cache} here;\n"
        f"  or give the model as a directory with config.json, *.safetensors and tokenizer.json, or as a .gguf file."
    )
