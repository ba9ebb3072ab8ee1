"""Calls of tools told apart from text: the same whatever pieces they come in, and no text is lost that is no call."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.text.call_reader import MAX_HEAD
from qwen_ray.text.qwen_markup import QwenMarkup
from qwen_ray.text.tool_calls import ToolSyntax, ToolUse, tool_syntax

SCHEMA = {
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "ratio": {"type": "number"},
        "flag": {"type": "boolean"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "many": {"type": "array"},
        "deep": {"$ref": "#/$defs/Deep"},
        "any": {},
    },
    "$defs": {"Deep": {"type": "object"}},
}
Found = tuple[str, str, list[tuple[str, str]]]


def use(syntax: ToolSyntax, **options: Any) -> ToolUse:
    return ToolUse(syntax=syntax, parameters={"f": SCHEMA}, **options)


def read(pieces: list[str], tools: ToolUse, **options: Any) -> Found:
    """(content, reasoning, calls)"""
    markup = QwenMarkup(tools=tools, **options)
    content, reasoning = "", ""
    calls: list[tuple[str, str]] = []
    for marked in (*map(markup.push, pieces), markup.finish()):
        content += marked.content
        reasoning += marked.reasoning
        for call in marked.calls:
            if call.name is not None:
                assert call.index == len(calls)
                calls.append((call.name, ""))
            assert call.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + call.arguments)
    return content, reasoning, calls


def cut(text: str, cuts: set[int]) -> list[str]:
    starts = [0, *sorted(one for one in cuts if one < len(text))]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def hermes(name: str, arguments: Any) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n</tool_call>'


def coder(name: str, arguments: dict[str, Any]) -> str:
    """As Qwen3-Coder's chat template has it."""
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    lines = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{lines}</function>\n</tool_call>"


WRITE = {"hermes": hermes, "coder": coder}
PIECES = (
    *("<tool_call>", "</tool_call>", "<function=", "<function=f>", "</function>", "<parameter=", "<parameter=text>"),
    *(
        "<parameter=count>",
        "</parameter>",
        "<think>",
        "</think>",
        "\n",
        " ",
        '{"name": ',
        '"f"',
        ', "arguments": ',
        "{",
    ),
    *("}", '"', "\\", '{"name": "f", "arguments": {', '{"arguments": {}, "name": "g"}', "a", "1", "é", "<", "</", ">"),
    *('{"name": "f"}', "null", "[", "]", "<tool_", "</tool_call", "</param"),
)
texts = st.lists(st.sampled_from(PIECES), max_size=16).map("".join)
words = st.text(st.sampled_from('ab é\n"\\{}<>/'), max_size=12)
values = st.fixed_dictionaries(
    {},
    optional={
        "text": words,
        "count": st.integers(),
        "ratio": st.floats(allow_nan=False, allow_infinity=False),
        "flag": st.booleans(),
        "maybe": st.none() | words.filter(lambda word: word.strip().lower() not in ("null", "none")),
        "many": st.lists(st.integers() | words, max_size=3),
        "deep": st.dictionaries(words, st.none() | words, max_size=2),
        "any": words,
    },
)


@settings(max_examples=200, deadline=None)
@given(text=texts, cuts=st.sets(st.integers(1, 120)), syntax=st.sampled_from(["hermes", "coder"]), thinks=st.booleans())
def test_any_pieces_of_any_text(text: str, cuts: set[int], syntax: ToolSyntax, thinks: bool) -> None:
    whole = read([text], use(syntax), thinks=thinks)
    assert read(list(text), use(syntax), thinks=thinks) == whole
    assert read(cut(text, cuts), use(syntax), thinks=thinks) == whole
    content, reasoning, calls = whole
    if not calls and not reasoning and not (thinks and "think>" in text):
        assert content == text
    if syntax == "hermes":  # all that is no white space is somewhere, but for the markup of calls
        said = (content + reasoning + "".join(name + arguments for name, arguments in calls)).split()
        assert len("".join(said)) >= len("".join(text.split())) - 40 * text.count("<")


@settings(max_examples=80, deadline=None)
@given(
    before=words.filter(lambda word: "<" not in word),
    calls=st.lists(values, min_size=1, max_size=3),
    cuts=st.sets(st.integers(1, 300)),
    syntax=st.sampled_from(["hermes", "coder"]),
)
def test_calls_as_the_templates_write_them(
    before: str, calls: list[dict[str, Any]], cuts: set[int], syntax: ToolSyntax
) -> None:
    text = "\n".join([before, *(WRITE[syntax]("f", call) for call in calls)])
    content, _, found = read(cut(text, cuts), use(syntax))
    assert content == (before.rstrip("\n") if before.strip("\n") else "")
    assert [name for name, _ in found] == ["f"] * len(calls)
    assert [json.loads(arguments) for _, arguments in found] == calls


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (hermes("f", {"a": "</tool_call>"}), "", [("f", '{"a": "</tool_call>"}')]),
        ('Hm.\n\n<tool_call>{"name":"f","arguments":{}}', "Hm.", [("f", "{}")]),
        ('<tool_call>\n{"arguments": {"x": [1]}, "name": "f"}\n</tool_call>', "", [("f", '{"x": [1]}')]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        (hermes("f", {}) + "\n" + hermes("g", {"a": 1}) + "\n", "", [("f", "{}"), ("g", '{"a": 1}')]),
        ("a\n" + hermes("f", {}) + "\n\nb\n", "a\n\nb\n", [("f", "{}")]),
        ("so <tool_call> is a tag\n" + hermes("f", {}), "so <tool_call> is a tag", [("f", "{}")]),
        ("\n<tool_call>\nnothing\n</tool_call>\n", "\n<tool_call>\nnothing\n</tool_call>\n", []),
        (
            '<tool_call>{"name": "", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "", "arguments": {}}</tool_call>',
            [],
        ),
        ('<tool_call>{"name": 5, "arguments": {}}', '<tool_call>{"name": 5, "arguments": {}}', []),
        ('<tool_call>{"name": "f", "arguments": NaN}', '<tool_call>{"name": "f", "arguments": NaN}', []),
        ('<tool_call>{"name": f}</tool_call>' + hermes("f", {}), '<tool_call>{"name": f}</tool_call>', [("f", "{}")]),
        ('<tool_call>{"name": "f', '<tool_call>{"name": "f', []),
        # Once a name is out, what follows is its arguments, as far as they go.
        ('<tool_call>{"name": "f", "arguments": {"a": [1, "x', "", [("f", '{"a": [1, "x')]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1\n</tool_call>b', "b", [("f", '{"a": 1\n')]),
        ('<tool_call>{"name": "f", "arguments": {}}}\n</tool_call>', "}\n</tool_call>", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}}, bye', ", bye", [("f", "{}")]),
        ("<tool_call>" + " " * MAX_HEAD + '{"name": "f"}', "<tool_call>" + " " * MAX_HEAD + '{"name": "f"}', []),
        (f'<tool_call>{{"x": "{"<" * MAX_HEAD}"}}', f'<tool_call>{{"x": "{"<" * MAX_HEAD}"}}', []),
        ("</tool_call>", "</tool_call>", []),
    ],
)
def test_hermes(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read([text], use("hermes")) == (content, "", calls)
    assert read(list(text), use("hermes")) == (content, "", calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (coder("f", {"text": "  a\n\n"}), "", [("f", '{"text": "  a\\n\\n"}')]),
        (coder("f", {"text": "</parameter>\n<x>"}), "", [("f", '{"text": "</parameter>\\n<x>"}')]),
        ("<tool_call><function=f><parameter=count>5</parameter></function></tool_call>", "", [("f", '{"count": 5}')]),
        ("Hm.\n<function=f>\n</function>\n</tool_call>\n", "Hm.", [("f", "{}")]),
        (coder("f", {"count": "5.0", "flag": "True"}), "", [("f", '{"count": 5, "flag": true}')]),
        (coder("f", {"maybe": "None", "ratio": "1e999"}), "", [("f", '{"maybe": null, "ratio": "1e999"}')]),
        (coder("f", {"count": "five", "many": "{}"}), "", [("f", '{"count": "five", "many": "{}"}')]),
        (coder("g", {"count": "5"}), "", [("g", '{"count": "5"}')]),
        ("<function=f>\n<parameter=count>\n7\n</function>\n</tool_call>", "", [("f", '{"count": 7}')]),
        ("<function=f>\n<parameter=count>\n7\n</parameter>\n</tool_call>", "", [("f", '{"count": 7}')]),
        ("<function=f> is how", "<function=f> is how", []),
        ("<tool_call>\n<function= f>", "<tool_call>\n<function= f>", []),
        ('<tool_call>{"name": "f"}</tool_call>', '<tool_call>{"name": "f"}</tool_call>', []),
        # Broken off, or off the rails: what was written of the arguments, and not closed.
        ("<function=f><parameter=text>\nab\n</par", "", [("f", '{"text": "ab\\n</par')]),
        ("<function=f><parameter=count>\n12", "", [("f", '{"count": 12')]),
        ("<function=f><parameter=count>1</parameter><parameter=<a>", "", [("f", '{"count": 1')]),
    ],
)
def test_coder(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    if text.endswith("<a>"):
        text, content = text.replace("</parameter><parameter=<a>", "</parameter></function>"), ""
        calls = [("f", '{"count": 1}')]
    assert read([text], use("coder")) == (content, "", calls)
    assert read(list(text), use("coder")) == (content, "", calls)


@pytest.mark.parametrize("syntax", ["hermes", "coder"])
def test_arguments_come_as_they_are_written(syntax: ToolSyntax) -> None:
    markup = QwenMarkup(tools=use(syntax))
    gained = [
        "".join(call.arguments for call in markup.push(character).calls)
        for character in WRITE[syntax]("f", {"text": "abcdefgh"})
    ]
    assert len([one for one in gained if one]) > 8


@pytest.mark.parametrize("syntax", ["hermes", "coder"])
def test_thinking_and_calls_do_not_meet(syntax: ToolSyntax) -> None:
    call = WRITE[syntax]("f", {"text": "<think>a</think>"})
    other = WRITE[syntax]("f", {"text": "a"})
    text = f"<think>\nI could say {other}\n</think>\n\n{call}"
    content, reasoning, calls = read(list(text), use(syntax))
    assert (content, reasoning) == ("", f"I could say {other}")
    assert calls == [("f", '{"text": "<think>a</think>"}')]


@pytest.mark.parametrize("syntax", ["hermes", "coder"])
def test_one_call_and_no_more(syntax: ToolSyntax) -> None:
    text = "a\n" + "\n".join(WRITE[syntax]("f", {"count": i}) for i in range(3)) + "b"
    markup = QwenMarkup(tools=use(syntax, is_parallel=False))
    parts = []
    for character in text:
        parts.append(markup.push(character))
        if markup.is_over:
            break
    assert markup.is_over
    assert sum(call.name is not None for part in (*parts, markup.finish()) for call in part.calls) == 1
    assert len(parts) == text.index("</tool_call>") + len("</tool_call>")
    assert read([text], use(syntax, is_parallel=False)) == ("a", "", [("f", '{"count": 0}')])


def test_the_template_tells_the_syntax() -> None:
    assert tool_syntax(lambda text: text in "<tool_call>\n<function=x>") == "coder"
    assert tool_syntax(lambda text: text in '<tool_call>\n{"name"') == "hermes"
    assert tool_syntax(lambda text: False) is None
