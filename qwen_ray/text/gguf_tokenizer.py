"""The tokenizer inside a GGUF file: byte-level BPE, its pre-tokenizer named by `tokenizer.ggml.pre`.

Knows which split rule stands behind each name (llama.cpp's src/llama-vocab.cpp lists them) and refuses names that it
does not know: a wrong rule gives wrong ids in silence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.gguf_header import GgufHeader, read_gguf_header
from qwen_ray.text.vocabulary import Vocabulary

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_NAMES = {
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "llama-bpe": "llama3",
    "llama-v3": "llama3",
    "llama3": "llama3",
    "smollm": "smollm",
    "gpt-2": "gpt2",
    "default": "gpt2",
}
_CONTROL, _USER_DEFINED = 3, 4  # in tokenizer.ggml.token_type
_NAMED_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def read_gguf_vocabulary(path: Path) -> Vocabulary:
    """Raises CheckpointError for a damaged file and for a tokenizer of another kind."""
    header = read_gguf_header(path)
    metadata = header.metadata
    tokens: list[str] = _required(header, "tokenizer.ggml.tokens")
    model = _required(header, "tokenizer.ggml.model")
    if model != "gpt2":
        raise CheckpointError(f"{path}: tokenizer.ggml.model is {model!r}; byte-level BPE ('gpt2') is served.")
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _NAMES:
        raise CheckpointError(f"{path}: tokenizer.ggml.pre is {name!r}; known are {', '.join(_NAMES)}.")
    rule = _NAMES[name]
    backend = Tokenizer(_bpe(header, tokens, ignore_merges=rule == "llama3"))
    backend.pre_tokenizer = _pre_tokenizer(rule)
    backend.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type", [])
    for special, number in ((True, _CONTROL), (False, _USER_DEFINED)):
        named = [token for token, kind in zip(tokens, kinds, strict=False) if kind == number]
        added = [AddedToken(token, special=special, normalized=False) for token in named]
        backend.add_tokens(added)  # pyright: ignore[reportUnknownMemberType]
    _add_ends(backend, header, tokens, default_bos=rule == "llama3")
    return Vocabulary(
        backend=backend,
        eos_token_ids=header.eos_token_ids,
        special_tokens={
            role: tokens[index]
            for role, key in _NAMED_TOKENS.items()
            if (index := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None and index < len(tokens)
        },
        chat_templates=_chat_templates(metadata),
    )


def _required(header: GgufHeader, key: str) -> Any:
    if key not in header.metadata:
        raise CheckpointError(f"{header.path}: it has no {key}, so no tokenizer.")
    return header.metadata[key]


def _bpe(header: GgufHeader, tokens: list[str], *, ignore_merges: bool) -> models.BPE:
    merges: list[str] = _required(header, "tokenizer.ggml.merges")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        return models.BPE(vocabulary, pairs, ignore_merges=ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{header.path}: its vocabulary and merges do not fit together ({error}).") from error


def _pre_tokenizer(rule: str) -> pre_tokenizers.PreTokenizer:
    if rule in ("qwen2", "llama3"):
        split = Regex(_QWEN2_SPLIT if rule == "qwen2" else _LLAMA3_SPLIT)
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(split, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if rule == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


def _add_ends(backend: Tokenizer, header: GgufHeader, tokens: list[str], *, default_bos: bool) -> None:
    """What goes before and after every text, as the file says: a begin token, and for embeddings an end token."""

    def wanted(name: str, default: bool) -> list[tuple[str, int]]:
        index = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        is_wanted = header.metadata.get(f"tokenizer.ggml.add_{name}_token", default)
        return [(tokens[index], index)] if is_wanted and index is not None and index < len(tokens) else []

    bos, eos = wanted("bos", default_bos), wanted("eos", False)
    if bos or eos:
        backend.post_processor = processors.TemplateProcessing(
            single=[*(name for name, _ in bos), "$A", *(name for name, _ in eos)], special_tokens=list({*bos, *eos})
        )


def _chat_templates(metadata: dict[str, Any]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    templates = {name.removeprefix(key + "."): text for name, text in metadata.items() if name.startswith(key + ".")}
    if key in metadata:
        templates["default"] = metadata[key]
    return templates
