"""Tokens to text: the same whatever pieces they come in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from qwen_ray.core.request import GenerateRequest, SamplingParams, TokenDelta
from qwen_ray.text.choice import Choice
from qwen_ray.text.tokenizer import Tokenizer
from qwen_ray.text.vocabulary import Vocabulary

EOS = 257
REQUEST = GenerateRequest(request_id="r", prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=99), seed=1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<start>", "<end>")])
    return Tokenizer(Vocabulary(backend=backend, eos_token_ids=(EOS,), chat_templates={}, special_tokens={}))


def read(choice: Choice, deltas: list[TokenDelta]) -> tuple[str, int, str | None, int | str | None]:
    text = ""
    for delta in deltas:
        piece = choice.push(delta)
        text += piece.text
        if piece.finish_reason is not None:
            return text, choice.num_tokens, piece.finish_reason, piece.stop_reason
    raise AssertionError("no finish reason")


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30), stop=st.text(min_size=1, max_size=3), cuts=st.sets(st.integers(1, 60)))
def test_pieces_do_not_matter(tokenizer: Tokenizer, text: str, stop: str, cuts: set[int]) -> None:
    tokens = [*tokenizer.encode(text), EOS]
    starts = [0, *sorted(cut for cut in cuts if cut < len(tokens))]
    ends = [*starts[1:], len(tokens)]
    pieces = [TokenDelta(request_id="r", token_ids=tuple(tokens[a:b])) for a, b in zip(starts, ends, strict=True)]
    pieces[-1] = replace(pieces[-1], finish_reason="stop", stop_token_id=EOS)
    found = read(Choice(0, REQUEST, (stop,), tokenizer), pieces)
    if stop in text:
        shown = text[: text.index(stop)]
        assert found == (shown, len((shown + stop).encode()), "stop", stop)
    else:
        assert found == (text, len(tokens), "stop", None)


def test_min_tokens_hold_stop_strings_off(tokenizer: Tokenizer) -> None:
    request = replace(REQUEST, sampling=SamplingParams(max_tokens=9, min_tokens=2))
    deltas = [TokenDelta(request_id="r", token_ids=(token,)) for token in tokenizer.encode("abab")]
    deltas[-1] = replace(deltas[-1], finish_reason="length")
    assert read(Choice(0, request, ("b",), tokenizer), deltas) == ("aba", 4, "stop", "b")


def test_a_text_that_ends_within_a_character(tokenizer: Tokenizer) -> None:
    delta = TokenDelta(request_id="r", token_ids=tuple(tokenizer.encode("a界")[:-1]), finish_reason="length")
    assert read(Choice(0, REQUEST, (), tokenizer), [delta]) == ("a\ufffd", 3, "length", None)


def test_the_end_token_is_shown_only_on_request(tokenizer: Tokenizer) -> None:
    delta = TokenDelta(request_id="r", token_ids=(65, EOS), finish_reason="stop", stop_token_id=EOS)
    sampling = SamplingParams(include_stop_str_in_output=True, skip_special_tokens=False)
    shown = Choice(0, replace(REQUEST, sampling=sampling), (), tokenizer).push(delta).text
    assert shown == tokenizer.decode((65, EOS), skip_special_tokens=False)
    hidden = Choice(0, replace(REQUEST, sampling=replace(sampling, include_stop_str_in_output=False)), (), tokenizer)
    assert hidden.push(delta).text == tokenizer.decode((65,))
