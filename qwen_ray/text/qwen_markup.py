"""What a Qwen model marks in its text, told apart as it comes: `<think>` reasoning `</think>`, calls, and content.

Knows one answer's text; nothing of tokens or of models. Newlines beside the tags belong to the tags, as Qwen3's chat
template reads them back: none at either edge of the reasoning, none before the content that follows it, none around
calls. What looks like a call and is none is content.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen_ray.text.call_reader import CallReader
from qwen_ray.text.tool_calls import CallDelta, ToolUse

THINK_START, THINK_END = "<think>", "</think>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """What a piece of text adds to each kind."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()


class QwenMarkup:
    """Of one text. `thinks`: blocks of reasoning are looked for; `starts_open`: the prompt ended with `<think>`.

    All pieces joined are the same whatever pieces the text came in. What has no end by then is reasoning all the same;
    of several blocks the reasoning is joined by a newline. An end without a start is plain text. Calls are looked for
    in content alone, thinking not in calls; without `tools` none are. `thinks_first`: a block stands at the start,
    or there is none, and later tags are plain text.
    """

    def __init__(
        self,
        *,
        thinks: bool = True,
        starts_open: bool = False,
        tools: ToolUse | None = None,
        thinks_first: bool = False,
    ) -> None:
        self._tools = tools
        self._thinks_first = thinks_first
        self._is_open = starts_open
        self._held = ""  # could become a tag
        self._reader: CallReader | None = None  # while a call is read
        self._opener = ""  # of that
        self._calls: list[CallDelta] = []  # of this push
        self._num_calls = 0
        self._has_broken_call = False
        self._reasoning = _Reasoning()
        self._content = _Content(follows_tag=starts_open, may_end_in_call=tools is not None)
        self._thinking_tags = _Tags((THINK_START, THINK_END))
        self._call_tags = _Tags(tuple(tools.openers) if tools else ())
        self._content_tags = _Tags((*self._thinking_tags.names, *self._call_tags.names)) if thinks else self._call_tags

    @property
    def is_over(self) -> bool:
        """One call has been made, and no more than one may be."""
        return self._num_calls > 0 and self._reader is None and self._tools is not None and not self._tools.is_parallel

    @property
    def asks_for_calls(self) -> bool:
        """Calls have been made, all of them written to their end."""
        return self._num_calls > 0 and not self._has_broken_call

    def push(self, text: str) -> Marked:
        """What `text` adds for certain."""
        text, self._held = self._held + text, ""
        self._read(text)
        return self._take()

    def finish(self) -> Marked:
        """What was held back, now that nothing follows."""
        while self._reader is not None:
            reader = self._reader
            rest = reader.finish()
            self._tell(reader)
            self._read(self._end_call(reader, rest))  # what is none may hold another
        self._add(self._held)
        self._held = ""
        self._content.finish()
        return self._take()

    def _read(self, text: str) -> None:
        rest: str | None = text
        while rest and not self.is_over:
            rest = self._read_text(rest) if self._reader is None else self._read_call(self._reader, rest)

    def _read_text(self, text: str) -> str | None:
        if self._thinks_first and not self._is_open and not THINK_START.startswith(text[: len(THINK_START)]):
            self._content_tags = self._call_tags
        tags = self._thinking_tags if self._is_open else self._content_tags
        tag = tags.find(text)
        if tag is None:
            end = tags.certain(text)
            self._add(text[:end])
            self._held = text[end:]
            return None
        self._add(text[: tag.start()])
        if self._tools is not None and tag[0] in self._tools.openers:
            self._reader, self._opener = self._tools.reader(), tag[0]
            return text[tag.start() :]
        self._turn(tag[0])
        return text[tag.end() :]

    def _read_call(self, reader: CallReader, text: str) -> str | None:
        rest = reader.push(text)
        self._tell(reader)
        return None if rest is None else self._end_call(reader, rest)

    def _tell(self, reader: CallReader) -> None:
        gained = reader.take()
        if reader.name is not None and self._opener:
            self._opener = ""
            self._content.call()
            self._calls.append(CallDelta(index=self._num_calls, name=reader.name, arguments=gained))
            self._num_calls += 1
        elif gained:
            self._calls.append(CallDelta(index=self._num_calls - 1, arguments=gained))

    def _end_call(self, reader: CallReader, rest: str) -> str:
        """What is to be read on."""
        self._reader = None
        if reader.name is None:
            self._content.add(self._opener)
            return rest[len(self._opener) :]
        self._has_broken_call = self._has_broken_call or not reader.is_whole
        return rest

    def _turn(self, tag: str) -> None:
        if self._is_open == (tag == THINK_END):
            self._is_open = not self._is_open
            if self._thinks_first and not self._is_open:
                self._content_tags = self._call_tags
            self._content.follows_tag = True
            self._reasoning.turn()
        elif not (self._is_open and self._reasoning.is_block_empty):  # a start right after the start says it once more
            self._add(tag)

    def _add(self, text: str) -> None:
        if self._is_open:
            self._reasoning.add(text)
        else:
            self._content.add(text)

    def _take(self) -> Marked:
        marked = Marked(content=self._content.text, reasoning=self._reasoning.text, calls=tuple(self._calls))
        self._content.text = self._reasoning.text = ""
        self._calls = []
        return marked


class _Content:
    """`text` is what has come since it was taken. Newlines are held back where it depends on what follows."""

    def __init__(self, *, follows_tag: bool, may_end_in_call: bool) -> None:
        self.text: str = ""
        self.follows_tag = follows_tag  # the first text does
        self._may_end_in_call = may_end_in_call
        self._ends_in_call = False
        self._has_text = False
        self._newlines: str = ""

    def add(self, text: str) -> None:
        text, self._newlines = self._newlines + text, ""
        if not self._has_text:
            shown = text.lstrip("\n")
            if not shown:
                self._newlines = text
                return
            text = shown if self.follows_tag else text
            self._has_text = True
        if self._may_end_in_call:
            shown = text.rstrip("\n")
            text, self._newlines = shown, text[len(shown) :]
        self._ends_in_call = self._ends_in_call and not text
        self.text += text

    def call(self) -> None:
        self._newlines = ""
        self.follows_tag = self._ends_in_call = True

    def finish(self) -> None:
        if not self._ends_in_call and (self._has_text or not self.follows_tag):
            self.text += self._newlines
        self._newlines = ""


class _Reasoning:
    """`text` is what has come since it was taken."""

    def __init__(self) -> None:
        self.text: str = ""
        self.is_block_empty = True  # but for newlines, so far
        self._has_text = False
        self._newlines: str = ""  # held back: they may be its last

    def add(self, text: str) -> None:
        if self.is_block_empty:
            text = text.lstrip("\n")
            if not text:
                return
            self._newlines = "\n" if self._has_text else ""
            self._has_text, self.is_block_empty = True, False
        text = self._newlines + text
        shown = text.rstrip("\n")
        self._newlines = text[len(shown) :]
        self.text += shown

    def turn(self) -> None:
        """A block begins or ends."""
        self.is_block_empty = True
        self._newlines = ""


class _Tags:
    """Texts to look for."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._pattern = re.compile("|".join(names)) if names else None
        self._longest = max(map(len, names), default=0)

    def find(self, text: str) -> re.Match[str] | None:
        return None if self._pattern is None else self._pattern.search(text)

    def certain(self, text: str) -> int:
        """Where in a text without tags what could become one begins; its end if nothing could."""
        at = text.rfind("<", max(0, len(text) - self._longest + 1)) if self.names else -1
        return at if at >= 0 and any(name.startswith(text[at:]) for name in self.names) else len(text)
