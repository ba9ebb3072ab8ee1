"""JSON schemas that only endless texts would match: objects that must hold an object of their own kind, and so on.

llguidance begins such a text and never ends it. Knows JSON Schema's keywords as far as they can force recursion; what
it does not know counts as finite.
"""

from __future__ import annotations

from typing import Any, cast

_ALL_TYPES = ("null", "boolean", "number", "integer", "string", "array", "object")


def is_endless(schema: dict[str, Any]) -> bool:
    """Whether no finite value can match `schema`, on account of its references."""
    targets = {ref: _resolve(schema, ref) for ref in _references(schema)}
    # References whose targets some finite value matches: the least fixed point. None: it is not in this schema.
    finite = {ref for ref, target in targets.items() if target is None}
    while found := {ref for ref in targets.keys() - finite if _is_finite(targets[ref], finite)}:
        finite |= found
    return not _is_finite(schema, finite)


def _references(node: Any) -> set[str]:
    if isinstance(node, list):
        return set[str]().union(*(_references(item) for item in cast("list[Any]", node)))
    if not isinstance(node, dict):
        return set()
    known = cast("dict[str, Any]", node)
    own = {known["$ref"]} if isinstance(known.get("$ref"), str) else set[str]()
    return own.union(*(_references(value) for value in known.values()))


def _resolve(root: Any, ref: str) -> Any:
    """None for what is not in this schema."""
    if ref != "#" and not ref.startswith("#/"):
        return None
    node = root
    for part in ref.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = cast("dict[str, Any]", node).get(key)
        elif isinstance(node, list) and key.isdecimal() and int(key) < len(cast("list[Any]", node)):
            node = cast("list[Any]", node)[int(key)]
        else:
            return None
    return node


def _is_finite(node: Any, finite: set[str]) -> bool:
    if not isinstance(node, dict):
        return True
    schema = cast("dict[str, Any]", node)
    if isinstance(ref := schema.get("$ref"), str) and ref not in finite:
        return False
    if not all(_is_finite(part, finite) for part in _list(schema.get("allOf"))):
        return False
    for options in (_list(schema.get("anyOf")), _list(schema.get("oneOf"))):
        if options and not any(_is_finite(option, finite) for option in options):
            return False
    if "enum" in schema or "const" in schema:
        return True
    types = schema.get("type", _ALL_TYPES)
    return any(_has_finite(kind, schema, finite) for kind in ([types] if isinstance(types, str) else _list(types)))


def _has_finite(kind: Any, schema: dict[str, Any], finite: set[str]) -> bool:
    """Whether some finite value of one type matches."""
    if kind == "array":
        fewest = schema.get("minItems", 0)
        first = _list(schema.get("prefixItems"))
        needed = first[:fewest] if isinstance(fewest, int) else []
        rest = schema.get("items") if isinstance(fewest, int) and fewest > len(first) else None
        return all(_is_finite(item, finite) for item in (*needed, rest))
    if kind == "object":
        given = schema.get("properties")
        properties = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
        others = schema.get("additionalProperties")
        return all(_is_finite(properties.get(str(name), others), finite) for name in _list(schema.get("required")))
    return True


def _list(value: Any) -> list[Any]:
    return list(cast("list[Any]", value)) if isinstance(value, list | tuple) else []
