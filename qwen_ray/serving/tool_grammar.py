"""What an answer that calls tools may look like, as a grammar in llguidance's Lark: in the markup the model speaks.

Knows the two syntaxes of calls and JSON schemas of arguments; not requests, and not whether a grammar is any good.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from qwen_ray.core.errors import InvalidRequest
from qwen_ray.grammar.recursion import is_endless
from qwen_ray.text.argument_type import TEXT, argument_types
from qwen_ray.text.tool_calls import ToolSyntax

# As json.dumps and the chat templates write it, which leaves nothing to pad an answer with.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_KEY = re.compile(r"[^<>\n]{1,256}")
_END = r'"\n</tool_call>"'
_SAID = {"description", "title", "examples", "default", "$comment"}
_NAMED = {"properties", "patternProperties", "$defs", "definitions"}  # whose keys are names
_OPENER = {"hermes": "<tool_call>", "coder": "<function="}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that may be called. What no grammar can check is let go; of one that `is_strict`, it is an error."""

    name: str
    parameters: Mapping[str, Any]
    is_strict: bool = False


def only_calls(tools: Sequence[Tool], syntax: ToolSyntax, *, is_parallel: bool) -> str:
    """Nothing but one call, or several. Raises InvalidRequest for parameters that are no object's, as all do."""
    return _lark(tools, syntax, rf"/\n{{0,2}}/ {_calls(is_parallel)}")


def calls_or_answer(tools: Sequence[Tool], syntax: ToolSyntax, answer: Mapping[str, Any], *, is_parallel: bool) -> str:
    """Calls, or JSON that follows the schema `answer`."""
    return _lark(tools, syntax, rf"/\n{{0,2}}/ ({_calls(is_parallel)} | answer)", f"answer: {_json(answer, True)}")


def text_and_calls(tools: Sequence[Tool], syntax: ToolSyntax) -> str:
    """Whatever the model likes to say, but a call that it begins is right."""
    opener = _OPENER[syntax]
    lead = f"lead[lazy]: /(.|\\n)*/ {_quoted(opener)}"
    return _lark(tools, syntax, "(lead rest)* /(.|\\n)*/", lead, begun=opener)


def _calls(is_parallel: bool) -> str:
    return r'call ("\n" call)*' if is_parallel else "call"


def _lark(tools: Sequence[Tool], syntax: ToolSyntax, start: str, *rules: str, begun: str = "") -> str:
    """`begun`: what the call has been told already, up to its end."""
    lines = [f"start: {start}", *rules]
    heads: list[str] = []
    for number, tool in enumerate(tools):
        opening, body, own = (_hermes if syntax == "hermes" else _coder)(tool, number)
        whole = "<tool_call>\n" + opening
        shown = whole[whole.index(begun) + len(begun) :]
        heads.append(f"{_quoted(shown)} {body} {_END}")
        lines += own
    name = "rest" if begun else "call"
    return "\n".join([*dict.fromkeys(lines), f"{name}: " + "\n  | ".join(heads)])


def _hermes(tool: Tool, number: int) -> tuple[str, str, list[str]]:
    """How it begins, what comes then, and the rules for that."""
    opening = f'{{"name": {json.dumps(tool.name)}, "arguments": '
    return opening, f'arguments_{number} "}}"', [f"arguments_{number}: {_json(_object(tool), tool.is_strict)}"]


def _coder(tool: Tool, number: int) -> tuple[str, str, list[str]]:
    schema = _object(tool)
    required = schema.get("required", [])
    properties = cast("Mapping[str, Any]", schema.get("properties") or {})
    parts: list[str] = []
    rules: list[str] = []
    for place, (key, value) in enumerate(properties.items()):
        if not _KEY.fullmatch(key):
            raise _wrong(tool, f"the name {key[:40]!r} cannot be written in this model's markup")
        parts.append(f"value_{number}_{place}" + ("" if key in required else "?"))
        rules.append(f"value_{number}_{place}: {_quoted(f'<parameter={key}>' + chr(10))} {_value(tool, key, value)}")
    return f"<function={tool.name}>\n", f'{" ".join(parts)} "</function>"', [*rules, *([_TEXT] if rules else [])]


_TEXT = 'text_value[lazy]: /(.|\\n)*/ "\\n</parameter>\\n"'


def _value(tool: Tool, key: str, schema: Any) -> str:
    """Of one argument, with its closing tag. Text is told from JSON as it is when it is read."""
    types = argument_types(tool.parameters, key)
    choices = schema.get("enum") if isinstance(schema, Mapping) else None
    if isinstance(choices, list) and choices and all(isinstance(one, str) for one in choices):
        return "(" + " | ".join(map(_quoted, choices)) + ') "\\n</parameter>\\n"'
    if types == TEXT or "string" in types:
        return "text_value"
    definitions = {name: tool.parameters[name] for name in ("$defs", "definitions") if name in tool.parameters}
    return _json({**definitions, **schema}, tool.is_strict) + ' "\\n</parameter>\\n"'


def _object(tool: Tool) -> dict[str, Any]:
    schema = {"type": "object", **tool.parameters}
    if schema["type"] != "object":
        raise _wrong(tool, f"type must be 'object', got {schema['type']!r}")
    if is_endless(schema):
        raise _wrong(tool, "they refer to themselves without an end, so that nothing can match them")
    return schema


def _wrong(tool: Tool, message: str) -> InvalidRequest:
    return InvalidRequest(f"tools: the parameters of {tool.name}: {message}.", param="tools")


def _json(schema: Mapping[str, Any], is_strict: bool) -> str:
    return "%json " + json.dumps({**_bare(schema), "x-guidance": {**_JSON_STYLE, "lenient": not is_strict}})


def _bare(schema: Any) -> Any:
    """Without what is said to people and models: it counts towards what a grammar may be."""
    if isinstance(schema, list):
        return [_bare(one) for one in cast("list[Any]", schema)]
    if not isinstance(schema, Mapping):
        return schema
    bare: dict[str, Any] = {}
    for key, value in cast("Mapping[str, Any]", schema).items():
        if key in _NAMED and isinstance(value, Mapping):
            bare[key] = {name: _bare(one) for name, one in cast("Mapping[str, Any]", value).items()}
        elif key not in _SAID:
            bare[key] = value if key in ("enum", "const") else _bare(value)
    return bare


def _quoted(text: str) -> str:
    return json.dumps(text)
