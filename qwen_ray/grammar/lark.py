"""A request's grammar in llguidance's own language, Lark with extensions (its docs/syntax.md).

Knows texts only; whether llguidance accepts the result, and at what cost, is matcher.py's business. Runs where it may
be killed: a grammar in GBNF is converted in plain Python.
"""

from __future__ import annotations

import json
import re
from typing import Any, cast

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from qwen_ray.core.errors import InvalidRequest
from qwen_ray.core.request import Grammar
from qwen_ray.grammar.endless import is_endless_lark
from qwen_ray.grammar.recursion import is_endless

MAX_GRAMMAR_DEPTH = 64  # of brackets in one another
MAX_JSON_SPACE = 32  # characters between two words of JSON: a model that pads would do it until max_tokens

# The model chooses how a text is split into tokens. Otherwise a rank would need the tokenizer itself, not only its
# vocabulary, and a mask would be a function of more than the text so far.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
_JSON_SPACE = rf"[\x20\x0A\x0D\x09]{{1,{MAX_JSON_SPACE}}}"


def to_lark(grammar: Grammar) -> str:
    """Raises InvalidRequest for what is no JSON where JSON is due, or too deep."""
    match grammar.kind:
        case "json_object":
            text = f"start: {_json({'type': 'object'})}"
        case "json_schema":
            text = f"start: {_json(_schema(grammar.text))}"
        case "choice":
            # One terminal: of thousands of rules llguidance would keep track one by one.
            choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in _choices(grammar.text))
            text = f"start: CHOICE\nCHOICE: {choices}"
        case "regex":
            _check_depth(grammar.text, "([{", ")]}", "regex")
            text = f"start: /{regex_to_lark(_unanchored(grammar.text), use_ascii='dws')}/"
        case "grammar":
            text = from_gbnf(grammar.text)
    return _OPTIONS + text


def from_gbnf(text: str) -> str:
    """Lark, which is left as it is, or llama.cpp's GBNF. Raises InvalidRequest."""
    _check_depth(text, "([{", ")]}", "grammar")
    try:
        lark = any_to_lark(text)
    except Exception as error:  # it raises plain ones, and whatever a parser meets
        raise _invalid(f"grammar is neither Lark nor GBNF: {error}") from error
    if is_endless_lark(lark):
        raise _invalid("the grammar refers to itself without an end: no text can match it")
    return lark


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(f"{message}.", param="structured_outputs")


def _json(schema: dict[str, Any]) -> str:
    """Options of llguidance's own that a client has written are left out: some make a schema mean less than it says."""
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": _JSON_SPACE}}, ensure_ascii=False)


def _schema(text: str) -> dict[str, Any]:
    schema = _loads(text, "json_schema")
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise _invalid("json_schema must be a JSON object")
    if is_endless(cast("dict[str, Any]", schema)):
        raise _invalid("the json_schema refers to itself without an end: no value can match it")
    return cast("dict[str, Any]", schema)


def _choices(text: str) -> list[str]:
    choices = _loads(text, "choice")
    if not isinstance(choices, list) or not choices:
        raise _invalid("choice must be a list of texts, and not empty")
    for choice in cast("list[Any]", choices):
        if not isinstance(choice, str) or not choice:
            raise _invalid("choice must hold texts, none of them empty")
    return cast("list[str]", choices)


def _loads(text: str, name: str) -> Any:
    _check_depth(text, "[{", "]}", name)
    try:
        return json.loads(text)
    except ValueError as error:
        raise _invalid(f"{name} is not valid JSON: {error}") from error


def _check_depth(text: str, opening: str, closing: str, name: str) -> None:
    """Counts brackets inside of strings too: nobody needs so many."""
    depth = 0
    for found in re.finditer(f"[{re.escape(opening + closing)}]", text):
        depth = depth + 1 if found[0] in opening else max(0, depth - 1)
        if depth > MAX_GRAMMAR_DEPTH:
            raise _invalid(f"{name} has more than {MAX_GRAMMAR_DEPTH} brackets in one another")


def _unanchored(regex: str) -> str:
    """All of a text must match as it is; llguidance knows no anchors."""
    regex = regex.removeprefix("^")
    is_anchored = regex.endswith("$") and (len(regex) - len(regex[:-1].rstrip("\\"))) % 2 == 1
    return regex[:-1] if is_anchored else regex
