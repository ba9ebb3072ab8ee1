"""What a chat may call: `tools`, `tool_choice` and `parallel_tool_calls` as rules for its answer.

Knows requests; how calls are written is tool_grammar.py's business, and how they are read that of the text package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from qwen_ray.core.errors import InvalidRequest
from qwen_ray.core.request import Grammar
from qwen_ray.grammar.recursion import is_endless
from qwen_ray.serving import schema, tool_grammar
from qwen_ray.serving.tool_schema import NamedTool
from qwen_ray.text.tool_calls import ToolSyntax, ToolUse

Asked = tuple[str, Grammar] | None  # a grammar, and the field that asks for it


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolRules:
    """`use`: how calls are told apart in the answer; None: they are not. `asked`: the grammar that it follows."""

    use: ToolUse | None = None
    asked: Asked = None


def tool_rules(body: schema.ChatRequest, syntax: ToolSyntax | None) -> ToolRules:
    """Raises InvalidRequest for what cannot be, or cannot be together."""
    choice = body.tool_choice or "auto"
    form = body.grammar()
    if not body.tools:
        if choice not in ("auto", "none"):
            raise InvalidRequest("tool_choice asks for a call, but there are no tools.", param="tool_choice")
        return ToolRules(asked=form)
    names = [tool.function.name for tool in body.tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"tools: two functions have the name {twice!r}.", param="tools")
    if choice == "none":
        return ToolRules(asked=form)
    if syntax is None:
        message = "This model calls no tools: its chat template has no <tool_call>. Leave tools out, or ask another."
        raise InvalidRequest(message, param="tools")
    tools = [
        tool_grammar.Tool(name=one.name, parameters=one.parameters or {}, is_strict=one.strict is True)
        for one in (tool.function for tool in body.tools)
    ]
    use = ToolUse(
        syntax=syntax,
        parameters={tool.name: tool.parameters for tool in tools},
        is_parallel=body.parallel_tool_calls is not False and not isinstance(choice, NamedTool),
    )
    return ToolRules(use=use, asked=_grammar(tools, use, choice, form))


def _grammar(tools: list[tool_grammar.Tool], use: ToolUse, choice: str | NamedTool, form: Asked) -> Asked:
    if choice != "auto":
        if form is not None:
            raise InvalidRequest(f"{form[0]} does not go with this tool_choice: there is no answer.", param=form[0])
        if isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool.name == choice.function.name]
        if not tools:
            message = f"tool_choice: no tool has the name {choice.function.name!r}."  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
            raise InvalidRequest(message, param="tool_choice")
        return _asked("tools", tool_grammar.only_calls(tools, use.syntax, is_parallel=use.is_parallel))
    if form is not None:
        text = tool_grammar.calls_or_answer(tools, use.syntax, _schema(form), is_parallel=use.is_parallel)
        return _asked(form[0], text)
    if any(tool.is_strict for tool in tools):
        return _asked("tools", tool_grammar.text_and_calls(tools, use.syntax))
    return None


def _asked(field: str, text: str) -> Asked:
    try:
        return field, Grammar(kind="grammar", text=text)
    except InvalidRequest as error:
        raise InvalidRequest(f"tools: with all of their schemas, {error.message}", param="tools") from error


def _schema(form: tuple[str, Grammar]) -> Mapping[str, Any]:
    """Of an answer beside which there may be calls."""
    field, grammar = form
    if grammar.kind == "json_object":
        return {"type": "object"}
    if grammar.kind != "json_schema":
        message = f"{field} goes with tools only where it is a JSON schema, or tool_choice is none."
        raise InvalidRequest(message, param=field)
    try:
        found: Any = json.loads(grammar.text)
        is_schema = isinstance(found, dict) and not is_endless(cast("dict[str, Any]", found))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field} is not valid JSON, or too deep: {error}.", param=field) from error
    if not is_schema:
        raise InvalidRequest(f"{field} must be a JSON schema that something can match.", param=field)
    return cast("dict[str, Any]", found)
