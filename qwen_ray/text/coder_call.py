"""One call as Qwen3-Coder writes it: `<function=NAME>`, a `<parameter=KEY>` value `</parameter>` for each argument.

Knows one call's text and the schemas of the functions' arguments: the values are plain text, which becomes the JSON
that their type asks for. A newline at either edge of a value belongs to the tags, as the model's chat template writes
it. What is read depends on the text alone, not on the pieces it comes in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from qwen_ray.text.argument_type import argument_types, to_json
from qwen_ray.text.call_reader import CALL_END, CALL_START, MAX_HEAD, CallReader

FUNCTION_START, FUNCTION_END = "<function=", "</function>"
PARAMETER_START, PARAMETER_END = "<parameter=", "</parameter>"

_HEAD = re.compile(r"(?:<tool_call>\s*)?<function=([^<>\s]+)>\s*(?=<parameter=|</function>)")
_POSSIBLE = re.compile(r"<function=(?:[^<>\s]+(?:>\s*(.*))?)?", re.DOTALL)
_KEY = re.compile(r"<parameter=([^<>\n]{1,256})>")
_POSSIBLE_KEY = re.compile(r"<parameter=[^<>\n]{0,256}")
# A value may hold `</parameter>` itself: it ends where the markup goes on behind it.
_VALUE_END = re.compile(
    r"\n?</parameter>\s{0,32}(?=<parameter=|</function>|</tool_call>)|\n?(?=</function>\s{0,32}</tool_call>)"
)
_TAGS = (PARAMETER_START, FUNCTION_END, CALL_END)
_LONGEST_END = 1 + len(PARAMETER_END) + 32 + len(PARAMETER_START)


class CoderCall(CallReader):
    """`parameters`: JSON schemas of arguments, by function."""

    def __init__(self, parameters: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self._parameters = parameters
        self._has_values = False
        self._is_at_start = True  # of a value
        self._types = frozenset[str]()  # of the value; none: it is text
        self._value = ""  # so far, of a type that only the whole shows

    def _break_off(self, held: str) -> None:
        if self._read == self._read_value:
            self._gained += _escaped(self._value + held)

    def _read_head(self, text: str) -> str | None:
        head = text[:MAX_HEAD]
        if match := _HEAD.match(head):
            self.name, self._read = match[1], self._read_tag
            return text[match.end() :]
        if len(head) < len(text) or not _could_begin(head):
            self._read = None
            return text
        return self._hold(text)

    def _read_tag(self, text: str) -> str | None:
        """Between values."""
        text = text.lstrip()
        if match := _KEY.match(text):
            self._begin_value(match[1])
            return text[match.end() :]
        for end in (FUNCTION_END, CALL_END):
            if text.startswith(end):
                self._gained += "}" if self._has_values else "{}"
                self.is_whole, self._read = True, self._read_tail
                return text[len(FUNCTION_END) if end == FUNCTION_END else 0 :]
        if _POSSIBLE_KEY.fullmatch(text) or any(tag.startswith(text) for tag in _TAGS):
            return self._hold(text)
        self._read = None
        return text

    def _begin_value(self, key: str) -> None:
        self._gained += (", " if self._has_values else "{") + json.dumps(key, ensure_ascii=False) + ": "
        self._types = argument_types(self._parameters.get(self.name or "", {}), key)
        self._gained += "" if self._types else '"'
        self._value = ""
        self._has_values = self._is_at_start = True
        self._read = self._read_value

    def _read_value(self, text: str) -> str | None:
        if self._is_at_start and text:
            text = text.removeprefix("\n")
            self._is_at_start = False
        match = _VALUE_END.search(text)
        end = match.start() if match else _certain(text)
        if self._types:
            self._value += text[:end]
        else:
            self._gained += _escaped(text[:end])
        if match is None:
            return self._hold(text[end:])
        self._gained += to_json(self._value, self._types) if self._types else '"'
        self._read = self._read_tag
        return text[match.end() :]

    def _read_tail(self, text: str) -> str | None:
        text = text.lstrip()
        if text != CALL_END and CALL_END.startswith(text):
            return self._hold(text)
        self._read = None
        return text.removeprefix(CALL_END)


def _could_begin(text: str) -> bool:
    """Whether text could go on to be a call's head."""
    text = text.removeprefix(CALL_START).lstrip()
    if FUNCTION_START.startswith(text):
        return True
    match = _POSSIBLE.fullmatch(text)
    return match is not None and any(tag.startswith(match[1] or "") for tag in (PARAMETER_START, FUNCTION_END))


def _certain(text: str) -> int:
    """How much of a value's text is no part of an end that is still to come."""
    at = text.find("<", max(0, len(text) - _LONGEST_END))
    at = len(text) if at < 0 else at
    return at - text.endswith("\n", 0, at)


def _escaped(text: str) -> str:
    """As a part of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
