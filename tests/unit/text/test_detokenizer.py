from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_ray.text.detokenizer import IncrementalDetokenizer
from qwen_ray.text.tokenizer import Tokenizer

TEXTS = {
    "chinese": "你好，世界！𠮷野家",
    "arabic": "مرحبا بالعالم، كيف حالك؟",
    "thai": "สวัสดีชาวโลก น้ำ",
    "hindi": "नमस्ते दुनिया, ज़िम्मेदारी",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ❤️",
    "latin": "naïve “quotes” – Ω ½",
}
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per byte: the worst that a model can do to a character."""
    # Both vocabularies begin with the 256 bytes, but for a few special tokens.
    single = {tokenizer.token_bytes(i): i for i in range(300) if len(tokenizer.token_bytes(i)) == 1}
    return [single[bytes([byte])] for byte in text.encode()]


def stream(tokenizer: Tokenizer, groups: list[list[int]], **options: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    return [*[detokenizer.push(group) for group in groups], detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("by_byte", [True, False])
def test_no_split_in_two_shows_a_broken_character(small: Tokenizer, text: str, by_byte: bool) -> None:
    ids = byte_ids(small, text) if by_byte else small.encode(text)
    for cut in range(len(ids) + 1):
        first, second, end = stream(small, [ids[:cut], ids[cut:]])
        assert first + second == text
        assert text.startswith(first)
        assert end == ""


@quick
@given(data=st.data())
def test_no_split_at_all_shows_a_broken_character(qwen: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.text(st.sampled_from("".join(TEXTS.values())), max_size=20))
    ids = data.draw(st.sampled_from([qwen.encode(text), byte_ids(qwen, text)]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    shown = stream(qwen, [ids[a:b] for a, b in pairwise([0, *cuts, len(ids)])])
    assert "".join(shown) == qwen.decode(ids)
    assert not any("\ufffd" in part for part in shown)


@quick
@given(data=st.data())
def test_any_ids_in_any_split_give_the_decoding_of_the_whole(small: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, small.vocab_size + 3), max_size=30))
    skip = data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    groups = [ids[a:b] for a, b in pairwise([0, *cuts, len(ids)])]
    assert "".join(stream(small, groups, skip_special_tokens=skip)) == small.decode(ids, skip_special_tokens=skip)


def test_characters_are_shown_with_their_last_byte(small: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(small)
    assert [detokenizer.push([i]) for i in byte_ids(small, "a你é👍")] == [
        *("a", "", "", "你", "", "é", "", "", "", "👍"),
    ]


def test_an_unfinished_character_shows_at_the_end_only(small: Tokenizer) -> None:
    assert stream(small, [byte_ids(small, "é你")[:-1]]) == ["é", "\ufffd"]


def test_invalid_bytes_show_once_that_is_certain(small: Tokenizer) -> None:
    broken = byte_ids(small, "你")[:2]
    assert stream(small, [broken, byte_ids(small, "a")]) == ["", "\ufffda", ""]


def test_special_tokens_are_skipped_or_shown(small: Tokenizer) -> None:
    ids = [*small.encode("a"), 1]
    assert "".join(stream(small, [ids])) == "a"
    assert "".join(stream(small, [ids], skip_special_tokens=False)) == "a<|end|>"


def test_output_completes_a_character_that_the_prompt_began(small: Tokenizer) -> None:
    ids = byte_ids(small, "xy你z")
    detokenizer = IncrementalDetokenizer(small, prompt_token_ids=ids[:4])
    assert [detokenizer.push(ids[4:]), detokenizer.finish()] == ["你z", ""]
    assert IncrementalDetokenizer(small, prompt_token_ids=ids[:4]).finish() == ""
