from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.text.stop import StopMatcher

letters = st.text("ab", max_size=24)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def outcome(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The specification: read up to the first place where some stop string is complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def could_begin(text: str, stops: list[str]) -> int:
    return max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)


@settings(max_examples=150, deadline=None)
@given(text=letters, stops=stop_lists, include=st.booleans(), data=st.data())
def test_any_split_gives_the_outcome_of_the_whole(
    text: str, stops: list[str], include: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    matcher = StopMatcher(stops, include)
    shown = ""
    for start, end in pairwise([0, *cuts, len(text)]):
        shown += matcher.push(text[start:end])
        if matcher.matched is None:
            # All is shown but what could become a stop string, and no more is held back than that.
            assert shown == text[: end - could_begin(text[:end], stops)]
    shown += matcher.finish()
    assert (shown, matcher.matched) == outcome(text, stops, include)


@pytest.mark.parametrize(
    ("stops", "pushes", "expected", "matched"),
    [
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""], "\n\n"),
        (["User:", "Us"], ["x Us", "er:"], ["x ", ""], "Us"),
        (["abc", "bc"], ["zabc"], ["z"], "abc"),
        (["停止"], ["请停", "下", "停", "止了"], ["请", "停下", "", ""], "停止"),
        ([], ["anything"], ["anything"], None),
    ],
)
def test_examples(stops: list[str], pushes: list[str], expected: list[str], matched: str | None) -> None:
    matcher = StopMatcher(stops)
    assert [matcher.push(text) for text in pushes] == expected
    assert matcher.matched == matched


def test_nothing_is_shown_after_a_match() -> None:
    matcher = StopMatcher(["."], include=True)
    assert [matcher.push("one. two"), matcher.push("three"), matcher.finish()] == ["one.", "", ""]


def test_long_repetitive_stop_strings_are_no_burden() -> None:
    # Each character is looked at a constant number of times: a quadratic matcher would not end within the suite.
    matcher = StopMatcher(["a" * 80_000 + "b"])
    shown = [matcher.push("a" * 40_000) for _ in range(5)]
    assert sum(map(len, shown)) == 120_000
    assert matcher.push("b") == ""
    assert matcher.matched is not None
