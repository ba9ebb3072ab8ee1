"""Reasoning and content told apart: by a slow reference, and the same whatever pieces the text comes in."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.text.qwen_markup import QwenMarkup

PIECES = ("<think>", "</think>", "<think>\n", "\n</think>\n\n", "<", "</", "think>", "<thi", "</t", "\n", "a", " é")
texts = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


def split(pieces: list[str], *, starts_open: bool = False, thinks_first: bool = False) -> tuple[str, str]:
    """(reasoning, content)"""
    markup = QwenMarkup(starts_open=starts_open, thinks_first=thinks_first)
    marked = [*map(markup.push, pieces), markup.finish()]
    return "".join(m.reasoning for m in marked), "".join(m.content for m in marked)


def slow_split(text: str, *, starts_open: bool) -> tuple[str, str]:
    contents, blocks = [], []
    rest = "<think>" + text if starts_open else text
    while rest:
        content, tag, rest = rest.partition("<think>")
        contents.append(content)
        if tag:
            rest = re.sub(r"^(\n*<think>)+", "", rest)
            block, _, rest = rest.partition("</think>")
            blocks.append(block.strip("\n"))
    reasoning = "\n".join(block for block in blocks if block)
    if blocks and not contents[0].strip("\n"):
        return reasoning, "".join(contents).lstrip("\n")
    return reasoning, "".join(contents)


@settings(max_examples=300, deadline=None)
@given(text=texts, starts_open=st.booleans(), cuts=st.sets(st.integers(1, 60)))
def test_any_pieces_of_any_text_against_the_slow_reference(text: str, starts_open: bool, cuts: set[int]) -> None:
    starts = [0, *sorted(cut for cut in cuts if cut < len(text))]
    pieces = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    expected = slow_split(text, starts_open=starts_open)
    assert split(pieces, starts_open=starts_open) == expected
    assert split(list(text), starts_open=starts_open) == expected


@settings(max_examples=200, deadline=None)
@given(thought=st.sampled_from([None, "", "a", "\na é\n"]), text=texts, starts_open=st.booleans())
def test_tags_after_the_first_block_are_plain_text(thought: str | None, text: str, starts_open: bool) -> None:
    text = "{" + text  # as a grammar begins
    if thought is None and not starts_open:
        said, expected = text, ("", text)
    else:
        said = f"{'' if starts_open else '<think>'}{thought or ''}</think>\n\n{text}"
        expected = ((thought or "").strip("\n"), text)
    assert split([said], starts_open=starts_open, thinks_first=True) == expected
    assert split(list(said), starts_open=starts_open, thinks_first=True) == expected


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\nHm.\n\nYes.\n</think>\n\nThe answer.\n", "Hm.\n\nYes.", "The answer.\n"),
        ("<think>\n\n</think>\n\nThe answer.", "", "The answer."),
        ("First <think>Hm.</think> last", "Hm.", "First  last"),
        ("<think>\nbroken off\n", "broken off", ""),
        ("<think>\na\n</think>\n\nb\n<think>\nc\n</think>\n\nd", "a\nc", "b\n\n\nd"),
        ("no tags\n\n", "", "no tags\n\n"),
        ("\n\n", "", "\n\n"),
        ("an end </think> alone", "", "an end </think> alone"),
        ("<think>what <think> means</think>ok", "what <think> means", "ok"),
        ("a < b <thin", "", "a < b <thin"),
    ],
)
def test_what_is_what(text: str, reasoning: str, content: str) -> None:
    assert split([text]) == (reasoning, content)


@pytest.mark.parametrize("text", ["Hm.\n</think>\n\nYes", "\nHm.</think>Yes", "<think>\nHm.\n</think>\n\nYes"])
def test_a_block_that_the_prompt_has_opened(text: str) -> None:
    assert split(list(text), starts_open=True) == ("Hm.", "Yes")


def test_nothing_is_held_back_that_is_certain() -> None:
    markup = QwenMarkup(starts_open=True)
    assert [markup.push(text).reasoning for text in ("a", "\n", "b <", "b", "</think")] == ["a", "", "\nb ", "<b", ""]
    assert markup.push(">x").content == "x"
    assert markup.push("\n").content == "\n"
