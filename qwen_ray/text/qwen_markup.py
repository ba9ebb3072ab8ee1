"""What a Qwen model marks in its text, told apart as it comes: `<think>` reasoning `</think>`, and content.

Knows one answer's text; nothing of tokens or of models. Newlines beside the tags belong to the tags, as Qwen3's chat
template reads them back: none at either edge of the reasoning, none before the content that follows it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

THINK_START, THINK_END = "<think>", "</think>"

_TAGS = (THINK_START, THINK_END)
_TAG = re.compile("|".join(_TAGS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """What a piece of text adds to each kind."""

    content: str = ""
    reasoning: str = ""


class QwenMarkup:
    """Of one text. `starts_open`: the prompt ended with `<think>`.

    All pieces joined are the same whatever pieces the text came in. What has no end by then is reasoning all the same;
    of several blocks the reasoning is joined by a newline. An end without a start is plain text.
    """

    def __init__(self, *, starts_open: bool = False) -> None:
        self._is_open = starts_open
        self._held = ""  # could become a tag
        self._content: str = ""  # of this push, as `_reasoning`
        self._reasoning: str = ""
        self._has_content = False
        self._has_reasoning = False
        self._is_block_empty = True  # but for newlines, so far
        self._has_tag = starts_open
        self._newlines: str = ""  # held back: before the first content, or after the reasoning so far

    def push(self, text: str) -> Marked:
        """What `text` adds for certain."""
        text = self._held + text
        start = 0
        for tag in _TAG.finditer(text):
            self._add(text[start : tag.start()])
            self._turn(tag[0])
            start = tag.end()
        end = _end_without_tag(text, start)
        self._add(text[start:end])
        self._held = text[end:]
        return self._take()

    def finish(self) -> Marked:
        """What was held back, now that nothing follows."""
        self._add(self._held)
        self._held = ""
        if not self._is_open and not self._has_tag:
            self._content += self._newlines
        self._newlines = ""
        return self._take()

    def _turn(self, tag: str) -> None:
        if self._is_open == (tag == THINK_END):
            self._is_open = not self._is_open
            self._has_tag = self._is_block_empty = True
            self._newlines = ""
        elif not (self._is_open and self._is_block_empty):  # a start right after the start says it once more
            self._add(tag)

    def _add(self, text: str) -> None:
        if self._is_open:
            self._add_reasoning(text)
        else:
            self._add_content(text)

    def _add_content(self, text: str) -> None:
        if not self._has_content:
            text = self._newlines + text
            shown = text.lstrip("\n")
            self._has_content = bool(shown)
            self._newlines = "" if shown else text
            text = shown if self._has_tag or not shown else text
        self._content += text

    def _add_reasoning(self, text: str) -> None:
        if self._is_block_empty:
            text = text.lstrip("\n")
            if not text:
                return
            self._newlines = "\n" if self._has_reasoning else ""
            self._has_reasoning, self._is_block_empty = True, False
        text = self._newlines + text
        shown = text.rstrip("\n")
        self._newlines = text[len(shown) :]
        self._reasoning += shown

    def _take(self) -> Marked:
        marked = Marked(content=self._content, reasoning=self._reasoning)
        self._content = self._reasoning = ""
        return marked


def _end_without_tag(text: str, start: int) -> int:
    """Where what could become a tag begins; the end of `text` if nothing could."""
    at = text.rfind("<", max(start, len(text) - max(map(len, _TAGS)) + 1))
    return at if at >= 0 and any(tag.startswith(text[at:]) for tag in _TAGS) else len(text)
