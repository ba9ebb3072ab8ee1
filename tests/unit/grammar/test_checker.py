"""Hostile grammars are refused in bounded work, by a process that may die of them; whoever comes next is served."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.core.errors import InvalidRequest, NotReady
from qwen_ray.core.request import Grammar
from qwen_ray.grammar import check_process, checker
from qwen_ray.grammar.check_process import in_a_fork, tried
from qwen_ray.grammar.checker import GrammarChecker
from qwen_ray.grammar.matcher import GrammarCompiler


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def doubling(depth: int) -> dict[str, Any]:
    """As many ways as there are subsets."""
    below = [{"$ref": f"#/$defs/l{i + 1}"} for i in range(depth)]
    levels = {f"l{i}": {"properties": {"a": ref, "b": ref}, "allOf": [ref, ref]} for i, ref in enumerate(below)}
    return {"$defs": {**levels, f"l{depth}": {"type": "object"}}, "$ref": "#/$defs/l0"}


EITHER = [
    {"anyOf": [{"properties": {name: {"const": 1}}, "required": [name]} for name in (f"a{i}", f"b{i}")]}
    for i in range(20)
]
INTERSECTION = " & ".join(f"/(.*a.{{{i}}}.*)/" for i in range(1, 30))

HOSTILE: dict[str, tuple[Any, str, str]] = {
    "deep schema": ("json_schema", json.dumps(nested(60)), "more than 64 brackets"),
    "deep regex": ("regex", "(" * 70 + "a" + ")" * 70, "more than 64 brackets"),
    "deep grammar": ("grammar", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "more than 64 brackets"),
    "deep text of JSON": ("json_schema", "[" * 60_000, "more than 64 brackets"),
    "itself": ("json_schema", '{"$ref": "#"}', "without an end"),
    "in circles": (
        "json_schema",
        json.dumps({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
        "without an end",
    ),
    "an object in an object": (
        "json_schema",
        json.dumps({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
        "without an end",
    ),
    "doubling": ("json_schema", json.dumps(doubling(40)), "too large"),
    "exponential choices": ("json_schema", json.dumps({"allOf": EITHER}), "too large"),
    "many properties": (
        "json_schema",
        json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}),
        "cannot be followed",
    ),
    "repetition of repetition": ("regex", "((a{1,100}){1,100}){1,100}", "cannot be followed"),
    "a wide memory": ("regex", "(.{0,300}a.{0,300}b.{0,300}){0,50}", "cannot be followed"),
    "intersections": ("grammar", f"start: T\nT: {INTERSECTION}", "too much work"),
    "repetition of rules": ("grammar", 'start: (a~1..100000)~1..100000\na: "x"', "cannot be followed"),
    "left without an end": ("grammar", 'start: start "a"', "without an end"),
    "nothing": ("regex", r"[^\s\S]", "nothing may follow"),
    "never": ("json_schema", '{"type": "integer", "minimum": 3, "maximum": 2}', "cannot be used"),
    "no regex": ("regex", "(", "unclosed group"),
    "look-ahead": ("regex", "(?=a)a", "look-around"),
    "back reference": ("regex", r"(a)\1", "backreferences"),
    "no pattern": ("json_schema", '{"type": "string", "pattern": "(["}', "unclosed"),
    "no type": ("json_schema", '{"type": "strin"}', "Invalid type"),
    "not JSON": ("json_schema", "{", "not valid JSON"),
    "no schema": ("json_schema", "[1]", "must be a JSON object"),
    "remote": ("json_schema", '{"$ref": "http://example.com/x"}', "example.com"),
    "not built": ("json_schema", '{"not": {}}', "Unimplemented keys"),
    "unknown format": ("json_schema", '{"type": "string", "format": "nonsense"}', "Unknown format"),
    "no choice": ("choice", "[]", "not empty"),
    "empty choice": ("choice", '["a", ""]', "none of them empty"),
    "no grammar": ("grammar", "hello world", "neither Lark nor GBNF"),
    "no rule": ("grammar", "start: foo", "unknown name"),
    "import": ("grammar", '%import python (x)\nstart: "a"', "Unknown common regex"),
    "grows when converted": (
        "grammar",
        "root ::= " + " | ".join(f'"w{i}"' for i in range(5500)),
        "at most 65536 bytes",
    ),
}

FINE: dict[str, tuple[Any, str]] = {
    "nested": ("json_schema", json.dumps(nested(20))),
    "a tree": (
        "json_schema",
        json.dumps(
            {"type": "object", "properties": {"c": {"type": "array", "items": {"$ref": "#"}}}, "required": ["c"]}
        ),
    ),
    "many values": ("json_schema", json.dumps({"enum": [f"value {i}" for i in range(3000)]})),
    "many items": ("json_schema", '{"type": "array", "items": {"type": "integer"}, "maxItems": 1000000000}'),
    "long strings": ("json_schema", '{"type": "string", "maxLength": 1000000000}'),
    "many repetitions": ("regex", "a{1,100000}"),
    "backtracking": ("regex", "(a|a)*b"),
    "stars of stars": ("regex", "((((a*)*)*)*)*"),
    "many choices": ("choice", json.dumps([f"option {i}" for i in range(3000)])),
    "ambiguous": ("grammar", 'start: start start | "x" | "y"'),
    "anything": ("json_object", ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused(name: str, compiler: GrammarCompiler) -> None:
    kind, text, says = HOSTILE[name]
    error, _ = in_a_fork(lambda: tried(compiler, Grammar(kind=kind, text=text)))
    assert error is not None
    assert says in error
    assert len(error) < 500


@pytest.mark.parametrize("name", FINE)
def test_what_only_looks_hostile_is_fine(name: str, compiler: GrammarCompiler) -> None:
    kind, text = FINE[name]
    assert in_a_fork(lambda: tried(compiler, Grammar(kind=kind, text=text)))[0] is None


def test_a_fork_that_takes_too_much_memory() -> None:
    error, _ = in_a_fork(lambda: (None, "x" * (check_process.MEMORY + 1)))
    assert error == "takes too much work."


@pytest.fixture
async def checks(tokenizer_path: Path, vocab_size: int) -> AsyncIterator[GrammarChecker]:
    checker = GrammarChecker(tokenizer_path, "auto", vocab_size)
    yield checker
    await checker.close()


async def test_a_check(checks: GrammarChecker) -> None:
    grammar = Grammar(kind="regex", text="[0-9]+", after_thinking=True)
    assert await checks.check(grammar) == grammar
    gbnf = await checks.check(Grammar(kind="grammar", text='root ::= "a" | "b"'))
    assert gbnf.text.startswith("%llguidance")
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="unclosed group"):
            await checks.check(Grammar(kind="regex", text="("))


async def test_its_event_loop_is_free_while_it_works(checks: GrammarChecker) -> None:
    _, text, _ = HOSTILE["intersections"]
    slow = asyncio.create_task(checks.check(Grammar(kind="grammar", text=text)))
    quick = asyncio.create_task(checks.check(Grammar(kind="regex", text="a")))
    num_turns = 0
    while not slow.done():
        await asyncio.sleep(0.001)
        num_turns += 1
    assert num_turns > 10
    with pytest.raises(InvalidRequest, match="too much work"):
        await slow
    assert (await quick).text == "a"


async def test_its_process_dies(checks: GrammarChecker) -> None:
    await checks.check(Grammar(kind="regex", text="a"))
    process = checks._process._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (await checks.check(Grammar(kind="regex", text="b"))).text == "b"


async def test_its_process_hangs(checks: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    await checks.check(Grammar(kind="regex", text="a"))
    assert checks._process._process is not None
    os.kill(checks._process._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(checker, "CHECK_SECONDS", 0.05)
    with pytest.raises(NotReady, match="try again"):
        await checks.check(Grammar(kind="regex", text="b"))
    monkeypatch.undo()
    assert (await checks.check(Grammar(kind="regex", text="b"))).text == "b"


async def test_few_are_remembered(checks: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker, "MAX_KNOWN", 3)
    for number in range(6):
        await checks.check(Grammar(kind="regex", text=f"a{number}"))
    assert len(checks._known) == 3


async def test_there_is_no_tokenizer(tmp_path: Path) -> None:
    checks = GrammarChecker(tmp_path, "auto", 100)
    with pytest.raises(NotReady, match=r"tokenizer\.json"):
        await checks.check(Grammar(kind="regex", text="a"))
    await checks.close()
