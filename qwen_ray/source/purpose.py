"""What a model's files say it is for: tokens, vectors, or scores.

Reads what sentence-transformers keeps beside the weights (modules.json, 1_Pooling, config_sentence_transformers.json),
and GGUF's `pooling_type`. What is pooled in another way than Qwen's embedding models do is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.gguf_header import read_gguf_header
from qwen_ray.core.model_config import ModelConfig
from qwen_ray.core.pooling import EmbeddingConfig, Task
from qwen_ray.source.config_file import read_json, read_object

_GGUF_POOLING: dict[int, Task] = {0: "generate", 3: "embed"}  # none, last; others are not served
_LAST_TOKEN = "lasttoken"


@dataclass(frozen=True, slots=True, kw_only=True)
class Purpose:
    """`embedding` counts where the task is to embed."""

    task: Task = "generate"
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)

    def applied(self, config: ModelConfig) -> ModelConfig:
        """The architecture as this purpose needs it: for vectors there need be no output head in the files."""
        return replace(config, tie_word_embeddings=True) if self.task == "embed" else config


def load_purpose(path: Path, wish: Task | Literal["auto"] = "auto") -> Purpose:
    """Of a directory or a .gguf file; a `wish` goes before what the files say. Raises CheckpointError."""
    if wish not in ("auto", "embed"):
        return Purpose(task=wish)
    if path.is_file():
        return Purpose(task="embed") if wish == "embed" else _of_gguf(path)
    if not (path / "modules.json").is_file():
        return Purpose(task="embed" if wish == "embed" else "generate")
    modules = _modules(path / "modules.json")
    if "LogitScore" in modules and wish == "auto":  # of rerankers, which say yes or no
        return Purpose(task="score")
    if "Pooling" not in modules:
        return Purpose(task="embed" if wish == "embed" else "generate")
    return Purpose(task="embed", embedding=_embedding(path, modules))


def _of_gguf(path: Path) -> Purpose:
    header = read_gguf_header(path)
    kind = header.metadata.get("general.architecture")
    pooling = header.metadata.get(f"{kind}.pooling_type", 0)
    if pooling not in _GGUF_POOLING:
        raise CheckpointError(f"{path}: {kind}.pooling_type is {pooling}; served are 0 (none) and 3 (last token).")
    return Purpose(task=_GGUF_POOLING[pooling])


def _modules(file: Path) -> dict[str, str]:
    """Class to folder."""
    listed: Any = read_json(file)
    try:
        return {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in listed}
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: must be a list of objects with a type and a path.") from error


def _embedding(path: Path, modules: dict[str, str]) -> EmbeddingConfig:
    if unknown := sorted(modules.keys() - {"Transformer", "Pooling", "Normalize"}):
        raise CheckpointError(f"{path / 'modules.json'}: a module {unknown[0]} is not served.")
    file = path / modules["Pooling"] / "config.json"
    pooling = read_object(file)
    mode = pooling.get("pooling_mode")
    modes = [mode] if mode else [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on]
    if [str(name).removeprefix("pooling_mode_") for name in modes] != [_LAST_TOKEN]:
        raise CheckpointError(f"{file}: pools by {', '.join(map(str, modes)) or 'nothing'}; served is {_LAST_TOKEN}.")
    about = path / "config_sentence_transformers.json"
    said = read_object(about) if about.is_file() else {}
    prompts: Any = said.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise CheckpointError(f"{about}: prompts must be texts by name.")
    name = said.get("default_prompt_name")
    if name is not None and name not in prompts:
        raise CheckpointError(f"{about}: default_prompt_name is {name!r}, and there is no such prompt.")
    return EmbeddingConfig(normalizes="Normalize" in modules, prompts=dict(prompts), default_prompt_name=name)
