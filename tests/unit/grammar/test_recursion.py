"""Which schemas no finite value can match."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_ray.grammar.recursion import is_endless

NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"type": "array", "minItems": 1, "items": {"$ref": "#"}},
        {"type": "array", "minItems": 2, "prefixItems": [{"type": "null"}, {"$ref": "#"}]},
        {"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["a"]},
        {"anyOf": [{"$ref": "#"}, {"allOf": [{"type": "string"}, {"$ref": "#"}]}]},
        {"type": "array", "minItems": 1, "items": {"$ref": "#/properties/a~1b"}, "properties": {"a/b": {"$ref": "#"}}},
    ],
)
def test_endless(schema: dict[str, Any]) -> None:
    assert is_endless(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object", "properties": {"next": {"$ref": "#"}}},
        {"type": ["object", "null"], "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
        {"properties": {"next": {"$ref": "#"}}, "required": ["next"]},  # a number, say
        {"type": "array", "items": {"$ref": "#"}},
        {"type": "array", "minItems": 1, "prefixItems": [{"type": "null"}, {"$ref": "#"}]},
        {"anyOf": [{"$ref": "#"}, {"type": "string"}]},
        {"$ref": "#/$defs/node", "$defs": {"node": {"anyOf": [NODE, {"type": "null"}]}}},
        {"$ref": "https://example.com/unknown"},
        {"$ref": "#/$defs/missing", "$defs": []},
    ],
)
def test_not_endless(schema: dict[str, Any]) -> None:
    assert not is_endless(schema)
