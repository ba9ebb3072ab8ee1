"""Grammars whose texts have no end are found, and no others."""

from __future__ import annotations

import json

import pytest

from qwen_ray.core.errors import InvalidRequest
from qwen_ray.core.request import Grammar
from qwen_ray.grammar.endless import is_endless_lark
from qwen_ray.grammar.lark import to_lark

SELF = json.dumps({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]})
TREE = json.dumps({"type": "object", "properties": {"a": {"$ref": "#"}}})

ENDLESS = {
    "right": 'start: "a" start',
    "left": 'start: start "a"',
    "itself": "start: start",
    "in circles": 'start: a\na: "x" b\nb: "y" c\nc: "z" a',
    "no way out": 'start: "a" start | "b" start "c"',
    "on another line": 'start: "a" start\n     | "b" start',
    "in a group": 'start: ("a" | "b") (start | "c" start)',
    "at least one": "start: a+\na: (a)",
    "so many": 'start: a~2..3\na: "x" start',
    "so many in braces": 'start: a{2,3}\na: "x" start',
    "a terminal": 'start: A\nA: "x" A',
    "with attributes": 'start[capture="x:y"]: "a" inner\ninner.2[lazy]: "b" start',
    "an inlined rule": '?start: "a" _b\n_b: "b" start',
    "behind a comment": 'start: "a" start // | "b"\n# start: "c"\n',
    "a bar in a text": r'start: "|" start /\/|x/ "\"|" start',
    "a tree's name": 'start: "a" start -> name',
    "a schema": f"start: %json {SELF}",
    "a grammar": 'start: %lark { start: "a" start }',
    "before what is ignored": 'start: "a" start\n%ignore /[ ]+/\n%import common.WORD\n',
}
FINE = {
    "an end": 'start: "a" start | "b"',
    "nothing": 'start: "a" start |',
    "empty": "start:",
    "may be": 'start: "a" start?',
    "in brackets": 'start: "a" [start]',
    "none or more": 'start: "a" (start)*',
    "no times": 'start: "a" start~0..3',
    "no times in braces": 'start: "a" start{0,3}',
    "on another line": 'start: "a" start\n  | "b"',
    "not reached": 'start: "a"\nother: other "b"',
    "one way out of three": 'start: a | "x" start | "y"\na: "b" a',
    "imported": "start: NUMBER\n%import common.NUMBER\n",
    "through others": 'start: a b\na: "x" b | "z"\nb: "y" | a',
    "a schema": f'start: %json {TREE} | "a" start',
    "a grammar": 'start: %lark { start: "a" start | "}" } ',
    "a regex": 'start: %regex { "substring_words": "a b" } | start "a"',
    "special tokens": "start: <|tool|> start | <[1-3]>",
    "without a start": 'root: root "a"',
    "nothing at all": "",
    "not closed": 'start: ("a" | [ "b"',
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless(name: str) -> None:
    assert is_endless_lark(ENDLESS[name])
    with pytest.raises(InvalidRequest, match=r"without an end|neither Lark nor GBNF"):
        to_lark(Grammar(kind="grammar", text=ENDLESS[name]))


@pytest.mark.parametrize("name", FINE)
def test_not_endless(name: str) -> None:
    assert not is_endless_lark(FINE[name])


def test_gbnf_is_looked_at_once_it_is_lark() -> None:
    with pytest.raises(InvalidRequest, match="without an end"):
        to_lark(Grammar(kind="grammar", text='root ::= "a" root'))
    to_lark(Grammar(kind="grammar", text='root ::= "a" root | "b"'))


def test_many_rules_in_either_order() -> None:
    for order in (1, -1):
        rules = "\n".join([f'r{i}: "x" r{i - 1}' for i in range(1, 3000)][::order])
        assert not is_endless_lark(f'start: r2999\nr0: "a"\n{rules}')
        assert is_endless_lark(f"start: r2999\nr0: r2999\n{rules}")
