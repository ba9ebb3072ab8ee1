"""What a model's files say about its text, whichever format they are in: the noun between readers and Tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field

import tokenizers


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """`special_tokens` are those that templates name (`bos_token`, `eos_token`, …); `chat_templates` by name."""

    backend: tokenizers.Tokenizer
    eos_token_ids: tuple[int, ...]
    special_tokens: dict[str, str] = field(default_factory=dict[str, str])
    chat_templates: dict[str, str] = field(default_factory=dict[str, str])
