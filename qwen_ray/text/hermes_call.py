"""One call as Qwen2.5 and Qwen3 write it: `<tool_call>` {"name": …, "arguments": {…}} `</tool_call>`.

Knows one call's text. Arguments are passed on as they come, in the model's own words: a client checks them, as it does
with OpenAI's. What is read depends on the text alone, not on the pieces it comes in.
"""

from __future__ import annotations

import json
import re
from typing import Any, cast

from qwen_ray.text.argument_type import strict_json
from qwen_ray.text.call_reader import CALL_END, CALL_START, MAX_HEAD, CallReader

_HEAD = re.compile(
    r'<tool_call>\s*\{\s*"name"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*")\s*,\s*"arguments"\s*:\s*(?=\{)', re.DOTALL
)
_POSSIBLE = re.compile(r'<tool_call>\s*(?:\{\s*(?:".*)?)?', re.DOTALL)
_OUTSIDE = re.compile(r'[^{}"<]*')
_INSIDE = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)  # a string


class HermesCall(CallReader):
    """`name` is known with the head, arguments come as they are written."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0  # of braces in the arguments
        self._is_in_string = False
        self._has_brace = False  # the last, of the object around name and arguments

    def _break_off(self, held: str) -> None:
        self._gained += held if self._is_in_string else ""  # otherwise it is a part of the tag

    def _read_head(self, text: str) -> str | None:
        """Name first is what Qwen writes; any order is read if the whole call comes within MAX_HEAD."""
        end = text.find(CALL_END)
        head = text[: min(MAX_HEAD, len(text) if end < 0 else end)]
        self._read = None
        if match := _HEAD.match(head):
            self.name = _name(match[1])
            self._read = None if self.name is None else self._read_arguments
            return text if self.name is None else text[match.end() :]
        if "}" in head and (decoded := _object(head)):
            return text[decoded[1] :] if self._takes(decoded[0]) else text
        if len(head) < len(text) or not _POSSIBLE.fullmatch(head):
            return text
        self._read = self._read_head
        return self._hold(text)

    def _takes(self, call: dict[str, Any]) -> bool:
        """Whether it is a call, with arguments or without."""
        name, arguments = call.get("name"), call.get("arguments", {})
        if not (
            isinstance(name, str) and name and isinstance(arguments, dict) and call.keys() <= {"name", "arguments"}
        ):
            return False
        self.name, self.is_whole, self._has_brace = name, True, True
        self._gained = json.dumps(arguments, ensure_ascii=False)
        self._read = self._read_tail
        return True

    def _read_arguments(self, text: str) -> str | None:
        at = 0
        while at < len(text):
            at = (_INSIDE if self._is_in_string else _OUTSIDE).match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
            found = text[at : at + 1]
            if found == "<" and text.startswith(CALL_END, at):
                self._gained += text[:at]
                self._read = None
                return text[at + len(CALL_END) :]
            if found == "\\" or (found == "<" and CALL_END.startswith(text[at:])):
                break  # what it is, the next character says
            at += len(found)
            self._is_in_string ^= found == '"'
            self._depth += (found == "{") - (found == "}")
            if found == "}" and not self._depth:
                self._gained += text[:at]
                self.is_whole, self._read = True, self._read_tail
                return text[at:]
        self._gained += text[:at]
        return self._hold(text[at:])

    def _read_tail(self, text: str) -> str | None:
        text = text.lstrip()
        if text.startswith("}") and not self._has_brace:
            self._has_brace = True
            text = text[1:].lstrip()
        if text.startswith(CALL_END):
            self._read = None
            return text[len(CALL_END) :]
        if CALL_END.startswith(text):
            return self._hold(text)
        self._read = None
        return text


def _name(text: str) -> str | None:
    try:
        return json.loads(text) or None
    except ValueError:
        return None


def _object(text: str) -> tuple[dict[str, Any], int] | None:
    """The JSON object behind the tag, and where it ends."""
    body = text.removeprefix(CALL_START).lstrip()
    try:
        value, end = strict_json.raw_decode(text, len(text) - len(body))
    except (ValueError, RecursionError):
        return None
    return (cast("dict[str, Any]", value), end) if isinstance(value, dict) else None
