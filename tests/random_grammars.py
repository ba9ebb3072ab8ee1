"""Schemas made at random, and grammars that nobody should have to follow. Not a test."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

NAMES = ("name", "a b", "ключ", 'q"', "id")
VALUES = ("red", "blue\n", "grün", 1, None, True, "", -3)


def random_schema(chance: random.Random) -> dict[str, Any]:
    """An object's; its answers are short, and there is always one."""
    schema = _object(chance, 2)
    if chance.random() < 0.1:  # a list of itself
        schema["properties"]["more"] = {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}
    if chance.random() < 0.1:
        schema["$defs"] = {"small": {"type": "integer", "minimum": 0, "maximum": 3}}
        schema["properties"]["small"] = {"$ref": "#/$defs/small"}
    return schema


def _object(chance: random.Random, depth: int) -> dict[str, Any]:
    names = chance.sample(NAMES, k=chance.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: _value(chance, depth) for name in names},
        "required": chance.sample(names, k=chance.randint(0, len(names))),
        "additionalProperties": False,
    }


def _value(chance: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_integer, _string, _plain, _pattern]
    if depth and chance.random() < 0.4:
        return chance.choice((_object, _list, _tuple, _one_of_several))(chance, depth - 1)
    return chance.choice(kinds)(chance)


def _integer(chance: random.Random) -> dict[str, Any]:
    low = chance.randint(-500, 500)
    return {"type": "integer", "minimum": low, "maximum": low + chance.randint(0, 500)}


def _string(chance: random.Random) -> dict[str, Any]:
    low = chance.randint(0, 3)
    return {"type": "string", "minLength": low, "maxLength": low + chance.randint(0, 4)}


def _pattern(chance: random.Random) -> dict[str, Any]:
    return {"type": "string", "pattern": chance.choice(("^[A-C]{2,3}-[0-9]$", "^(yes|no)?$", "^\\d{2}:\\d{2}$"))}


def _plain(chance: random.Random) -> dict[str, Any]:
    return chance.choice(
        (
            {"type": "boolean"},
            {"type": "null"},
            {"type": ["boolean", "null"]},
            {"enum": chance.sample(VALUES, k=chance.randint(1, 4))},
            {"const": chance.choice(VALUES)},
            {"type": "string", "format": chance.choice(("date", "uuid"))},
        )
    )


def _list(chance: random.Random, depth: int) -> dict[str, Any]:
    low = chance.randint(0, 2)
    return {"type": "array", "items": _value(chance, depth), "minItems": low, "maxItems": low + chance.randint(0, 2)}


def _tuple(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "array", "prefixItems": [_value(chance, depth) for _ in range(2)], "minItems": 2, "items": False}


def _one_of_several(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_value(chance, depth) for _ in range(chance.randint(1, 3))]}


def hostile_grammars() -> Iterator[tuple[str, dict[str, Any]]]:
    """More than 200, family by family: a name, and the field that asks for it."""
    for family in (_deep, _recursive, _exponential, _invalid):
        yield from family()


def _deep() -> Iterator[tuple[str, dict[str, Any]]]:
    for depth in range(70, 90, 2):
        objects: dict[str, Any] = {"type": "string"}
        lists: dict[str, Any] = {"type": "string"}
        for _ in range(depth):
            objects = {"type": "object", "properties": {"a": objects}, "required": ["a"]}
            lists = {"type": "array", "items": lists}
        yield f"objects, {depth} deep", {"guided_json": json.dumps(objects)}
        yield f"lists, {depth} deep", {"structured_outputs": {"json": json.dumps(lists)}}
        yield f"groups of a regex, {depth} deep", {"guided_regex": "(" * depth + "a" + ")" * depth}
        yield f"groups of Lark, {depth} deep", {"guided_grammar": "start: " + "(" * depth + '"a"' + ")" * depth}


def _recursive() -> Iterator[tuple[str, dict[str, Any]]]:
    for length in range(1, 16):
        ring = [f"r{i}" for i in range(length)]
        around = list(zip(ring, [*ring[1:], ring[0]], strict=True))
        bare = {name: {"$ref": f"#/$defs/{other}"} for name, other in around}
        within = {
            name: {"type": "object", "properties": {"a": {"$ref": f"#/$defs/{other}"}}, "required": ["a"]}
            for name, other in around
        }
        yield f"{length} references", {"guided_json": {"$ref": "#/$defs/r0", "$defs": bare}}
        yield f"{length} objects", {"response_format": strict({"$ref": "#/$defs/r0", "$defs": within})}
        lark = "\n".join(f'{name}: "a" {other}' for name, other in around)
        yield f"{length} rules of Lark", {"guided_grammar": f"start: r0\n{lark}"}
        gbnf = "\n".join(f'{name} ::= "a" {other}' for name, other in around)
        yield f"{length} rules of GBNF", {"structured_outputs": {"grammar": f"root ::= r0\n{gbnf}"}}


def _exponential() -> Iterator[tuple[str, dict[str, Any]]]:
    for size in range(10):
        below = [{"$ref": f"#/$defs/l{i + 1}"} for i in range(40 + size)]
        levels = {f"l{i}": {"properties": {"a": ref, "b": ref}, "allOf": [ref, ref]} for i, ref in enumerate(below)}
        twice = {"$defs": {**levels, f"l{len(below)}": {"type": "object"}}, "$ref": "#/$defs/l0"}
        yield f"twice {len(below)} times", {"guided_json": twice}
        either = [
            {"anyOf": [{"properties": {name: {"const": 1}}, "required": [name]} for name in (f"a{i}", f"b{i}")]}
            for i in range(20 + size)
        ]
        yield f"{len(either)} choices of two", {"guided_json": {"allOf": either}}
        many = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500 + 20 * size)}}
        yield f"{len(many['properties'])} properties", {"guided_json": many}
        yield f"repeated {size}", {"guided_regex": f"((a{{1,{100 + size}}}){{1,100}}){{1,100}}"}
        overlapping = [{"type": "string", "maxLength": size + i} for i in range(20)]
        yield f"overlapping {size}", {"guided_json": {"oneOf": overlapping}}
        all_of = " & ".join(f"/(.*a.{{{i}}}.*)/" for i in range(1, 28 + size))
        yield f"intersections {size}", {"guided_grammar": f"start: T\nT: {all_of}"}
        yield f"repeated rules {size}", {"guided_grammar": f'start: (a~1..{100_000 + size})~1..100000\na: "x"'}


def _invalid() -> Iterator[tuple[str, dict[str, Any]]]:
    for regex in ("(", "[a", "a{2", "(?=a)a", r"(a)\1", "*a", "(?P<x", "[z-a]", r"\p{No}x(", "a" * 70_000):
        yield f"regex {regex[:10]}", {"guided_regex": regex}
    schemas: list[Any] = [
        {"type": "strin"},
        {"type": "integer", "minimum": 3, "maximum": 2},
        {"type": "string", "pattern": "(["},
        {"type": "string", "format": "nonsense"},
        {"$ref": "http://example.com/x"},
        {"not": {}},
        {"type": "array", "uniqueItems": True},
        {"enum": []},
        {"type": "object", "properties": 5},
        {"type": "array", "minItems": 3, "maxItems": 2, "items": {"type": "null"}},
        "{",
        "[1]",
        "[" * 60_000,
    ]
    for schema in schemas:
        yield f"schema {str(schema)[:40]}", {"guided_json": schema}
    for grammar in ("hello world", "start: foo", '%import python (x)\nstart: "a"', "start: /(/", 'start: "a'):
        yield f"grammar {grammar[:10]}", {"guided_grammar": grammar}
    for choices in ([], [""], ["a", ""], ["x"] * 5000):
        yield f"choices {str(choices)[:10]}", {"guided_choice": choices}


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
