"""Which JSON types an argument of a function may have, and plain text as a value of one of them.

Knows JSON schemas as far as types go: `type`, `enum`, `const`, `anyOf`, `oneOf`, `allOf` and references within the
schema. A type that cannot be told is text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn, cast

MAX_SCHEMAS = 100  # within one another that are looked into
TEXT = frozenset[str]()  # what text alone can be


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


strict_json = json.JSONDecoder(parse_constant=_refuse)
_NAMES: dict[type[Any], str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    dict: "object",
    list: "array",
}


def argument_types(schema: Mapping[str, Any], name: str) -> frozenset[str]:
    """Of argument `name` of a function whose parameters have `schema`; empty where it can only be text."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return TEXT
    types = _types(cast("Mapping[str, Any]", properties).get(name), schema)
    return TEXT if types <= {"string"} else types


def to_json(text: str, types: frozenset[str]) -> str:
    """`text` as a value of one of `types`, in JSON; as a string if it is none of them."""
    plain = text.strip()
    word = plain.lower()
    if "null" in types and word in ("null", "none"):
        return "null"
    if "boolean" in types and word in ("true", "false"):
        return word
    try:
        value = strict_json.decode(plain)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    if isinstance(value, float) and value.is_integer() and "number" not in types and abs(value) < 2**53:
        value = int(value)
    kind = _kind(value)
    fits = kind in types or (kind == "integer" and "number" in types)
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return json.dumps(value if fits and kind != "string" and is_finite else text, ensure_ascii=False)


def _types(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    found: set[str] = set()
    looked_at: list[object] = [schema]
    for one in looked_at:  # it grows, and may go in circles
        if not isinstance(one, Mapping) or len(looked_at) > MAX_SCHEMAS:
            continue
        part = cast("Mapping[str, Any]", one)
        values = [*_list(part.get("enum")), *([part["const"]] if "const" in part else [])]
        named = [name for name in _list(part.get("type")) if isinstance(name, str)]
        found.update(named or (_kind(value) for value in values))
        for word in ("anyOf", "oneOf", "allOf"):
            looked_at += _list(part.get(word))
        if isinstance(reference := part.get("$ref"), str):
            looked_at.append(_resolve(reference, root))
    return frozenset(found)


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else [] if value is None else [value]


def _resolve(reference: str, root: Mapping[str, Any]) -> object:
    """`#/$defs/Name`, from the schema's root."""
    found: object = root
    for part in reference.removeprefix("#/").split("/"):
        found = cast("Mapping[str, object]", found).get(part) if isinstance(found, Mapping) else None
    return found


def _kind(value: object) -> str:
    return _NAMES.get(type(value), "null")
