from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from qwen_ray.core.errors import CheckpointError
from qwen_ray.text.tokenizer import Tokenizer

WriteGguf = Callable[..., Path]
TEXT = "It's 1234567 o'clock\n\n  7 你好"


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


def test_same_ids_as_the_tokenizer_it_was_made_from(small: Tokenizer, small_backend: Backend) -> None:
    assert small.encode(TEXT) == small_backend.encode(TEXT).ids
    assert small.decode(small.encode(TEXT)) == TEXT


def test_token_types_and_ends(small: Tokenizer) -> None:
    tool = small.vocab_size - 1
    assert small.encode("<|begin|><tool><|end|>") == [0, tool, 1]
    assert small.special_token_ids == {0, 1}
    assert small.eos_token_ids == (1,)


def test_end_of_turn_counts_as_an_end(write_gguf: WriteGguf) -> None:
    assert Tokenizer.load(write_gguf(ggml_eot_token_id=0)).eos_token_ids == (1, 0)


@pytest.mark.parametrize(
    ("pre", "digits"),
    [("gpt-2", None), ("smollm", 1), ("qwen2", 1), ("llama-bpe", 3)],
)
def test_pre_tokenizers_split_digits_their_own_way(write_gguf: WriteGguf, pre: str, digits: int | None) -> None:
    tokenizer = Tokenizer.load(write_gguf(ggml_pre=pre))
    longest = max(len(piece.strip()) for piece in pieces(tokenizer, "1234567") if piece.strip().isdigit())
    assert longest == (digits or longest)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (longest > 3) == (digits is None)


def test_smollm_takes_digits_out_before_white_space_is_split(write_gguf: WriteGguf) -> None:
    # The two line ends before a digit stay together, which GPT-2's rule alone would not do.
    assert pieces(Tokenizer.load(write_gguf(ggml_pre="smollm")), "a\n\n7")[-2:] == ["\n\n", "7"]
    assert pieces(Tokenizer.load(write_gguf(ggml_pre="gpt-2")), "a\n\n7")[-3:] == ["\n", "\n", "7"]


def test_qwen2_normalizes(write_gguf: WriteGguf) -> None:
    tokenizer = Tokenizer.load(write_gguf(ggml_pre="qwen2"))
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "é"


@pytest.mark.parametrize(
    ("pre", "add_bos", "has_bos"),
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_begin_token_only_where_asked_for(write_gguf: WriteGguf, pre: str, add_bos: bool | None, has_bos: bool) -> None:
    tokenizer = Tokenizer.load(write_gguf(ggml_pre=pre, ggml_add_bos_token=add_bos))
    assert (tokenizer.encode("a")[0] == 0) == has_bos
    assert tokenizer.encode("a", add_special_tokens=False)[0] != 0


@pytest.mark.parametrize("add_bos", [False, True])
def test_end_token_behind_every_text_where_asked_for(write_gguf: WriteGguf, add_bos: bool) -> None:
    tokenizer = Tokenizer.load(write_gguf(ggml_add_bos_token=add_bos, ggml_add_eos_token=True))
    plain = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("a") == [*([0] if add_bos else []), *plain, 1]


def test_chat_template_and_special_tokens(write_gguf: WriteGguf) -> None:
    path = write_gguf(chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    assert Tokenizer.load(path).render_chat([{"role": "user", "content": "hi"}]) == "<|begin|>hi<|end|>"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ggml_model": "llama"}, "tokenizer.ggml.model is 'llama'"),
        ({"ggml_pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'; known are qwen2"),
        ({"ggml_tokens": None}, "no tokenizer.ggml.tokens"),
        ({"ggml_merges": ["neither here"]}, "do not fit together"),
    ],
)
def test_other_tokenizers_are_refused(write_gguf: WriteGguf, changes: dict[str, object], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        Tokenizer.load(write_gguf(**changes))
