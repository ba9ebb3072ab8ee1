"""Lark grammars that only endless texts would match: a rule that must hold itself, and so on.

llguidance begins such a text and never ends it. Knows Lark's syntax as far as it can force recursion; what it does not
know counts as finite, and whether a grammar is any good is not known here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

from qwen_ray.grammar.recursion import is_endless

_TOKEN = re.compile(
    r"""(?://|\#)[^\n]*                      # a comment
    | (?P<text>"(?:\\.|[^"\\\n])*"i?)
    | (?P<regex>/(?:\\.|[^/\\\n])+/[a-z]*)
    | (?P<special><[^<>\n]*>)
    | (?P<directive>%[a-z]+)
    | (?P<name>[?!]?[A-Za-z_][A-Za-z0-9_-]*)
    | (?P<number>\d+)
    | (?P<sign>->|\.\.|[^\s\w])""",
    re.VERBOSE,
)
_JSON = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class _Token:
    """`kind` is a group of `_TOKEN`, or "finite" or "endless" for a whole grammar in the place of a token."""

    kind: str
    text: str


_Rules = dict[str, list[_Token]]


def is_endless_lark(text: str) -> bool:
    """Whether no finite text can match `start`, on account of its rules. `text` has few brackets in one another."""
    rules = _rules(_tokens(text))
    finite: set[str] = set()
    left, num_before = list(rules), len(rules) + 1
    while len(left) < num_before:  # from below and from above in turn: rules stand in one order or the other
        num_before = len(left)
        left.reverse()
        for name in left:
            if _Body(rules[name], rules, finite).is_finite():
                finite.add(name)
        left = [name for name in left if name not in finite]
    return "start" in left


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    position = 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        position = position + 1 if found is None else found.end()
        if found is None or found.lastgroup is None:
            continue
        if found[0] in ("%json", "%regex", "%lark"):
            is_without_end, position = _inner(found[0], text, position)
            tokens.append(_Token("endless" if is_without_end else "finite", found[0]))
        else:
            tokens.append(_Token(found.lastgroup, found[0]))
    return tokens


def _inner(directive: str, text: str, position: int) -> tuple[bool, int]:
    """Of JSON, or a grammar in braces, right after its directive: whether it is endless, and where it ends."""
    while position < len(text) and text[position].isspace():
        position += 1
    if directive != "%lark":
        try:
            value, end = cast("tuple[Any, int]", _JSON.raw_decode(text, position))
        except ValueError:
            return False, position
        is_schema = directive == "%json" and isinstance(value, dict)
        return is_schema and is_endless(cast("dict[str, Any]", value)), end
    depth = 0
    for found in _TOKEN.finditer(text, position):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return is_endless_lark(text[position + 1 : found.start()]), found.end()
    return False, len(text)


def _rules(tokens: list[_Token]) -> _Rules:
    """What stands behind each name and its colon. Of attributes, priorities and directives nothing is left."""
    colons = [number for number, token in enumerate(tokens) if token == _Token("sign", ":")]
    heads = [_head(tokens, colon) for colon in colons]
    rules: _Rules = {}
    for head, colon, end in zip(heads, colons, [*heads, len(tokens)][1:], strict=True):
        body = tokens[colon + 1 : end]
        cut = next((number for number, token in enumerate(body) if token.kind == "directive"), len(body))
        rules[tokens[head].text.lstrip("?!")] = body[:cut]
    return rules


def _head(tokens: list[_Token], colon: int) -> int:
    """Where the name is that a colon belongs to: before attributes in brackets, and a priority."""
    at = colon - 1
    while at > 0 and (tokens[at].text == "]" or tokens[at].kind == "number"):
        opening = "[" if tokens[at].text == "]" else "."
        while at > 0 and tokens[at].text != opening:
            at -= 1
        at -= 1
    return max(at, 0)


class _Body:
    """One rule's alternatives, read from left to right."""

    def __init__(self, tokens: list[_Token], rules: Collection[str], finite: Collection[str]) -> None:
        self._tokens = tokens
        self._rules = rules
        self._finite = finite
        self._at = 0

    def is_finite(self) -> bool:
        """Whether some alternative is, up to a closing bracket."""
        some, all_so_far = False, True
        while (text := self._text()) not in ("", ")", "]", "}"):
            if text == "|":
                self._at += 1
                some, all_so_far = some or all_so_far, True
            else:
                all_so_far = self._item() and all_so_far
        return some or all_so_far

    def _item(self) -> bool:
        """One atom with how often it may come."""
        is_finite = self._atom()
        text = self._text()
        if text in ("?", "*"):
            is_finite = True
        if text in ("?", "*", "+"):
            self._at += 1
        elif text in ("~", "{") and self._text(1).isdecimal():
            is_finite = is_finite or int(self._text(1)) == 0
            self._at += 2
            while self._text() in ("..", ",", "}") or self._text().isdecimal():
                self._at += 1
        return is_finite

    def _atom(self) -> bool:
        token = self._tokens[self._at]
        self._at += 1
        if token.text in ("(", "["):
            is_finite = self.is_finite()
            self._at += 1
            return is_finite or token.text == "["
        if token.text == "->":  # what a tree would call it
            self._at += 1
            return True
        if token.kind == "name":
            return token.text not in self._rules or token.text in self._finite
        return token.kind != "endless"

    def _text(self, ahead: int = 0) -> str:
        at = self._at + ahead
        return self._tokens[at].text if at < len(self._tokens) else ""
