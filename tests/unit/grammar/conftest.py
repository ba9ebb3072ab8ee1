"""A small tokenizer with tokens of several bytes, some of them across JSON's own borders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from qwen_ray.grammar.matcher import GrammarCompiler
from qwen_ray.text.tokenizer import Tokenizer as OurTokenizer

SPECIAL = ("<|end|>", "<|start|>")
TAGS = ("<think>", "</think>")
NUM_UNUSED = 45  # logits without a token, as models have them


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [json.dumps({"name": "Ada", "tags": ["a", "b"], "age": i, "ok": True, "x": None}) for i in range(60)]
    backend.train_from_iterator([*texts, "Grüße, 世界", "true false null"], trainer)
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in TAGS])
    folder = tmp_path_factory.mktemp("json-tokens")
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    (folder / "chat_template.jinja").write_text("{{ '<think>\n</think>' }}")
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> OurTokenizer:
    return OurTokenizer.load(tokenizer_path)


@pytest.fixture(scope="session")
def vocab_size(tokenizer: OurTokenizer) -> int:
    return tokenizer.vocab_size + NUM_UNUSED


@pytest.fixture(scope="session")
def compiler(tokenizer: OurTokenizer, vocab_size: int) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size)
