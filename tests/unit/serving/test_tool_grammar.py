"""What answers that call tools may look like: each grammar takes what the parser reads, and nothing that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from qwen_ray.core.errors import InvalidRequest, RequestFailed
from qwen_ray.core.request import Grammar
from qwen_ray.grammar.matcher import GrammarCompiler
from qwen_ray.serving.tool_grammar import Tool, calls_or_answer, only_calls, text_and_calls
from qwen_ray.text.qwen_markup import QwenMarkup
from qwen_ray.text.tokenizer import Tokenizer
from qwen_ray.text.tool_calls import ToolSyntax, ToolUse
from tests.unit.serving.conftest import VOCAB_SIZE

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer"},
        "deep": {"$ref": "#/$defs/Deep"},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"Deep": {"type": "object", "properties": {"x": {"type": "boolean"}}}},
}
TOOLS = [
    Tool(name="weather", parameters=SCHEMA, is_strict=True),
    Tool(name="clock", parameters={}),
    Tool(name="note", parameters={"properties": {"text": {"type": "string"}}}),
]
Takes = Callable[[str, str], bool]


@pytest.fixture(scope="module")
def takes(tokenizer: Tokenizer) -> Takes:
    """Whether a text follows a grammar to its end."""
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE)

    def follows(lark: str, text: str) -> bool:
        matcher = compiler.matcher(Grammar(kind="grammar", text=lark))
        try:
            matcher.add(tokenizer.encode(text, add_special_tokens=False))
        except RequestFailed:
            return False
        return matcher.allowed()[1]

    return follows


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def coder(name: str, **values: str) -> str:
    lines = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{lines}</function>\n</tool_call>"


RIGHT = {
    "hermes": [
        hermes("weather", '{"city": "世界</tool_call>", "days": 3}'),
        hermes("weather", '{"city": "", "deep": {"x": true}}'),
        hermes("clock", '{"any": [1]}'),
        hermes("note", '{"text": "a"}'),
    ],
    "coder": [
        coder("weather", city="世界\n</parameter>x", unit="C", days="3", deep='{"x": true}'),
        coder("weather", city=""),
        coder("clock"),
        coder("note", text="a"),
    ],
}
WRONG = {
    "hermes": [
        hermes("weather", '{"days": 3}'),
        hermes("weather", '{"city": 5}'),
        hermes("weather", '{"city": "a", "unit": "K"}'),
        hermes("weather", '{"city": "a", "other": 1}'),
        hermes("nothing", "{}"),
        hermes("clock", "{}")[:-3],
    ],
    "coder": [
        coder("weather", days="3"),
        coder("weather", city="a", unit="K"),
        coder("weather", city="a", days="three"),
        coder("weather", city="a", other="1"),
        coder("nothing"),
        coder("clock")[:-3],
    ],
}
SYNTAXES: list[ToolSyntax] = ["hermes", "coder"]


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_only_calls(takes: Takes, syntax: ToolSyntax) -> None:
    one, many = (only_calls(TOOLS, syntax, is_parallel=is_parallel) for is_parallel in (False, True))
    for call in RIGHT[syntax]:
        assert takes(one, call), call
        assert takes(many, "\n\n" + call), call
        markup = QwenMarkup(tools=ToolUse(syntax=syntax, parameters={"weather": SCHEMA}))
        marked = (markup.push(call), markup.finish())
        assert markup.asks_for_calls
        assert not any(part.content for part in marked)
        json.loads("".join(delta.arguments for part in marked for delta in part.calls))
    for call in WRONG[syntax]:
        assert not takes(one, call), call
        assert not takes(many, call), call
    assert takes(many, "\n".join(RIGHT[syntax]))
    assert not takes(one, "\n".join(RIGHT[syntax]))
    assert not takes(many, "Hm. " + RIGHT[syntax][0])
    assert not takes(many, "")


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_an_answer_or_calls(takes: Takes, syntax: ToolSyntax) -> None:
    answer = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammar = calls_or_answer(TOOLS, syntax, answer, is_parallel=True)
    assert takes(grammar, '{"a": 1}')
    assert takes(grammar, "\n".join(RIGHT[syntax]))
    assert not takes(grammar, '{"a": "b"}')
    assert not takes(grammar, "Hm.")
    assert not takes(grammar, WRONG[syntax][0])


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_text_and_calls(takes: Takes, syntax: ToolSyntax) -> None:
    grammar = text_and_calls(TOOLS, syntax)
    for call in RIGHT[syntax]:
        assert takes(grammar, f"Hm.\n{call}\nand {call} so on")
    for call in WRONG[syntax][:-1]:
        assert not takes(grammar, f"Hm.\n{call}")
    assert takes(grammar, "a < b <tool")
    assert takes(grammar, "")


def test_what_no_grammar_can_check_is_an_error_if_it_is_strict(takes: Takes) -> None:
    odd = {"properties": {"a": {"type": "string", "format": "odd"}}}
    assert takes(only_calls([Tool(name="f", parameters=odd)], "hermes", is_parallel=False), hermes("f", '{"a": "b"}'))
    with pytest.raises(InvalidRequest, match="odd"):
        takes(only_calls([Tool(name="f", parameters=odd, is_strict=True)], "hermes", is_parallel=False), "")


def test_what_is_said_of_arguments_is_no_part_of_it(takes: Takes) -> None:
    long = {"type": "string", "description": "x" * 5000, "title": "y" * 5000}
    schema = {"description": "z" * 5000, "properties": {"description": long, "enum": {"enum": [{"title": "t"}]}}}
    tool = Tool(name="f", parameters={**schema, "additionalProperties": False, "required": ["description"]})
    grammar = only_calls([tool], "hermes", is_parallel=False)
    assert len(grammar) < 1000
    assert takes(grammar, hermes("f", '{"description": "a", "enum": {"title": "t"}}'))
    assert not takes(grammar, hermes("f", "{}"))


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"type": "array"}, "type must be 'object', got 'array'"),
        ({"properties": {"a>b": {}}}, "cannot be written"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "without an end"),
        ({"type": ["object"]}, "must be 'object'"),
    ],
)
def test_parameters_that_cannot_be(parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        only_calls([Tool(name="f", parameters=parameters)], "coder", is_parallel=False)
    assert caught.value.param == "tools"
