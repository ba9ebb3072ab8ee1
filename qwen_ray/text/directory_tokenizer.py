"""The tokenizer of a Hugging Face directory: tokenizer.json, and what stands beside it.

Knows the files' names and their spellings over the years. tokenizer.json is taken as it is; tokenizer_config.json adds
tokens, the names of the special ones and the chat template; chat_template.jinja goes before it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.model_config import token_ids
from qwen_ray.text.vocabulary import Vocabulary

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_directory_vocabulary(path: Path) -> Vocabulary:
    """Raises CheckpointError if tokenizer.json is missing, or a file is not what its name says."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: no tokenizer.json; qwen-ray needs the fast tokenizer's file.")
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{file}: not a tokenizer ({error}).") from error
    backend.no_truncation()
    backend.no_padding()
    config = _read_json(path / "tokenizer_config.json")
    for _, spec in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        token = AddedToken(**{key: value for key, value in spec.items() if key != "id"})
        backend.add_tokens([token])  # pyright: ignore[reportUnknownMemberType]
    special = _special_tokens({**_read_json(path / "special_tokens_map.json"), **config})
    return Vocabulary(
        backend=backend,
        eos_token_ids=_eos_token_ids(path, backend, special),
        special_tokens=special,
        chat_templates=_chat_templates(path, config),
    )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object.")
    return cast("dict[str, Any]", value)


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Role to text; a token is spelled as a string or as {"content": ...}."""
    found: dict[str, str] = {}
    for role in _ROLES:
        value = config.get(role)
        text = value.get("content") if isinstance(value, dict) else value  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        if isinstance(text, str):
            found[role] = text
    return found


def _eos_token_ids(path: Path, backend: Tokenizer, special: dict[str, str]) -> tuple[int, ...]:
    """Those of config.json and generation_config.json together; where neither names one, the tokenizer's own."""
    named = [
        token_ids(_read_json(path / name).get("eos_token_id")) for name in ("config.json", "generation_config.json")
    ]
    if any(named):
        return tuple(dict.fromkeys(index for group in named for index in group))
    return token_ids(backend.token_to_id(special["eos_token"]) if "eos_token" in special else None)


def _chat_templates(path: Path, config: dict[str, Any]) -> dict[str, str]:
    value: Any = config.get("chat_template")
    if isinstance(value, list):  # several, by name
        templates = {entry["name"]: entry["template"] for entry in cast("list[dict[str, str]]", value)}
    else:
        templates = {} if value is None else {"default": str(value)}
    file = path / "chat_template.jinja"
    if file.is_file():
        templates["default"] = file.read_text(encoding="utf-8")
    for other in sorted((path / "additional_chat_templates").glob("*.jinja")):
        templates[other.stem] = other.read_text(encoding="utf-8")
    return templates
