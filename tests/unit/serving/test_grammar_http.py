"""Answers that follow a grammar, over real HTTP, from ranks that would say anything: every field that asks for one."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qwen_ray.core.plan import EngineConfig
from qwen_ray.grammar.checker import GrammarChecker
from qwen_ray.grammar.matcher import GrammarCompiler
from tests.unit.serving.conftest import EOS, TAGS, VOCAB_SIZE, Server
from tests.unit.serving.mortal_replicas import MadeUpRanks

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 1.2, "seed": 3, "max_tokens": 150}
PROMPT = {"prompt": "Hi", "temperature": 1.2, "seed": 3, "max_tokens": 150}
START = VOCAB_SIZE - len(TAGS)
CLOSING = [1, 60, 92]  # quotes and brackets, so that texts end soon; ids are not the bytes' own
SPACE = {"197": -99, "198": -99, "201": -99, "220": -99}
SCHEMA = {
    "type": "object",
    "properties": {"b": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}, "a": {"enum": ["x", "ß"]}},
    "required": ["b", "a"],
    "additionalProperties": False,
}
ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}


def follows_schema(text: str) -> None:
    value = json.loads(text)
    jsonschema.validate(value, SCHEMA)
    assert list(value) == ["b", "a"]


def is_object(text: str) -> None:
    assert isinstance(json.loads(text), dict)


def matches(pattern: str) -> Callable[[str], None]:
    def check(text: str) -> None:
        assert re.fullmatch(pattern, text), text

    return check


FIELDS: list[tuple[dict[str, Any], Callable[[str], None]]] = [
    ({"response_format": {"type": "json_object"}}, is_object),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}}, follows_schema),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "description": "d", "strict": True, "schema": SCHEMA},
            }
        },
        follows_schema,
    ),
    ({"structured_outputs": {"json": SCHEMA}}, follows_schema),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, follows_schema),
    ({"structured_outputs": {"regex": "[a-c]{2}-[0-9]+;"}}, matches("[a-c]{2}-[0-9]+;")),
    ({"structured_outputs": {"choice": ["Grüße", "no", 'a "b"']}}, matches('Grüße|no|a "b"')),
    ({"structured_outputs": {"grammar": 'start: "a" NUMBER\nNUMBER: /[0-9]{2}/'}}, matches("a[0-9]{2}")),
    ({"structured_outputs": {"json_object": True}}, is_object),
    ({"guided_json": SCHEMA}, follows_schema),
    ({"guided_json": json.dumps(SCHEMA)}, follows_schema),
    ({"guided_regex": "yes|no!"}, matches("yes|no!")),
    ({"guided_choice": ["one", "two"]}, matches("one|two")),
    ({"guided_grammar": 'root ::= "x" [0-9] "y"'}, matches("x[0-9]y")),
]


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    """One for all: its process takes a second to start."""
    checker = GrammarChecker(Path("nowhere"), "dummy", VOCAB_SIZE)
    yield checker
    asyncio.run(checker.close())


def talk(server: Server, checker: GrammarChecker) -> Server:
    """Its replicas have real samplers, and logits that come of their tokens alone."""
    server.service.generator._grammars = checker
    compiler = GrammarCompiler(server.tokenizer, VOCAB_SIZE)
    for replica in server.replicas:
        replica.engine._executor = MadeUpRanks(VOCAB_SIZE, CLOSING, {}, compiler)
    return server


@pytest.fixture
async def talker(server: Server, checker: GrammarChecker) -> Server:
    return talk(server, checker)


@pytest.fixture
async def thinker(
    thinking_tokenizer: Any, engine_config: EngineConfig, checker: GrammarChecker
) -> AsyncIterator[Server]:
    server = await Server(thinking_tokenizer, engine_config).start(num_replicas=1)
    yield talk(server, checker)
    await server.stop()


def body(path: str, **fields: Any) -> dict[str, Any]:
    return {**(HELLO if path == CHAT else PROMPT), "logit_bias": SPACE, **fields}


async def ask(server: Server, path: str, **fields: Any) -> list[dict[str, Any]]:
    response = await server.client.post(path, json=body(path, **fields))
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def text_of(choice: dict[str, Any]) -> str:
    return choice["message"]["content"] if "message" in choice else choice["text"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_every_field(talker: Server, path: str) -> None:
    for fields, check in FIELDS:
        (choice,) = await ask(talker, path, **fields)
        assert choice["finish_reason"] == "stop"
        check(text_of(choice))


async def test_no_grammar_is_none(talker: Server) -> None:
    for fields in ({"response_format": {"type": "text"}}, {"guided_json": None, "structured_outputs": None}, {}):
        await ask(talker, CHAT, **fields)
        assert talker.replicas[0].requests[-1].sampling.grammar is None


async def test_each_of_a_batch_has_its_own(talker: Server) -> None:
    answers = await asyncio.gather(*(ask(talker, CHAT, **fields) for fields, _ in FIELDS[:6]), ask(talker, CHAT))
    for (choice,), (_, check) in zip(answers[:6], FIELDS[:6], strict=True):
        check(text_of(choice))


async def test_every_choice_follows_it(talker: Server) -> None:
    choices = await ask(talker, CHAT, n=4, structured_outputs={"json": SCHEMA})
    for choice in choices:
        follows_schema(text_of(choice))
    assert len(set(map(text_of, choices))) > 1


async def test_a_stream_is_the_whole_answer(talker: Server) -> None:
    fields = {"response_format": {"type": "json_object"}}
    (whole,) = await ask(talker, CHAT, **fields)
    async with talker.client.stream("POST", CHAT, json=body(CHAT, stream=True, **fields)) as response:
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    deltas = [choice["delta"] for line in lines[:-1] for choice in json.loads(line)["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == text_of(whole)


@pytest.mark.parametrize(
    ("fields", "pattern", "reason"),
    [
        ({"ignore_eos": True}, "[a-c]{2,6}", "stop"),  # it goes on as long as it may
        ({"min_tokens": 5}, "[a-c]{5,6}", "stop"),
        ({"min_tokens": 50}, "[a-c]{6}", "stop"),
        ({"max_tokens": 1}, "[a-c]", "length"),
        ({"stop": ["a", "b"]}, "c*", "stop"),
        ({"stop_token_ids": [64, 65]}, "c*", "stop"),
    ],
)
async def test_what_else_ends_an_answer(talker: Server, fields: dict[str, Any], pattern: str, reason: str) -> None:
    for seed in range(3):
        (choice,) = await ask(talker, CHAT, guided_regex="[a-c]{2,6}", **fields, seed=seed)
        assert re.fullmatch(pattern, text_of(choice))
        assert choice["finish_reason"] == reason


async def test_ignore_eos_goes_to_the_longest(talker: Server) -> None:
    (choice,) = await ask(talker, COMPLETIONS, guided_regex="[a-c]{2,6}", ignore_eos=True)
    assert len(text_of(choice)) == 6


@pytest.mark.parametrize(
    ("bias", "fields", "thinks"),
    [
        ({str(START): 12}, {}, True),
        ({str(START): 12}, {"thinking_budget": 7}, True),
        ({str(START): -90}, {}, False),
        ({str(START): 90}, {"enable_thinking": False}, False),
        ({}, {"chat_template_kwargs": {"opens": True}}, True),
    ],
)
async def test_what_is_thought_is_free(
    thinker: Server, bias: dict[str, float], fields: dict[str, Any], thinks: bool
) -> None:
    ends = {str(START + 1): 14, str(EOS): 30}
    asked = {"structured_outputs": {"json": SCHEMA}, "logit_bias": {**SPACE, **ends, **bias}, "max_tokens": 300}
    answer = (await thinker.client.post(CHAT, json=body(CHAT, **asked, **fields))).json()
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert (answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0) == thinks
    follows_schema(choice["message"]["content"])


async def test_tags_in_a_text_of_its_own_are_no_thinking(thinker: Server) -> None:
    said = '"<think>a</think>"'
    schema = {"const": "<think>a</think>"}
    for fields in ({}, {"enable_thinking": False}):
        (choice,) = await ask(thinker, CHAT, guided_json=schema, logit_bias={str(START): -90}, **fields)
        assert (choice["message"]["content"], choice["message"]["reasoning_content"]) == (said, None)


async def test_completions_have_it_from_the_start(thinker: Server) -> None:
    (choice,) = await ask(thinker, COMPLETIONS, guided_regex="[0-9]{3}", logit_bias={str(START): 90})
    assert re.fullmatch("[0-9]{3}", choice["text"])


SCHEMA_FIELD = "response_format.json_schema.schema"


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"guided_regex": "("}, "guided_regex", "unclosed group"),
    ({"guided_regex": "a" * 70_000}, "guided_regex", "at most 65536 bytes"),
    ({"guided_regex": "a\ud800"}, "guided_regex", "surrogates"),
    ({"guided_regex": 5}, "guided_regex", "valid string"),
    ({"guided_choice": []}, "guided_choice", "at least 1"),
    ({"guided_choice": [""]}, "guided_choice", "empty"),
    ({"guided_choice": ["x"] * 5000}, "guided_choice", "at most 4096"),
    ({"guided_json": "{"}, "guided_json", "not valid JSON"),
    ({"guided_json": "[" * 60_000}, "guided_json", "brackets"),
    ({"guided_json": {"type": "no"}}, "guided_json", "Invalid type"),
    ({"guided_grammar": "start: foo"}, "guided_grammar", "unknown name"),
    ({"structured_outputs": {"json": ENDLESS}}, "structured_outputs.json", "without an end"),
    ({"structured_outputs": {}}, "structured_outputs", "needs one of"),
    ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs.json_object", "together"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "Unknown field"),
    ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "guided_json and guided_regex"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "together"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema goes with"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        "Missing",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
        SCHEMA_FIELD,
        "Unimplemented",
    ),
    ({"guided_decoding_backend": "x"}, "guided_decoding_backend", "Unknown field"),
]
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_what_is_refused(talker: Server, path: str) -> None:
    for fields, param, says in REFUSED:
        response = await talker.client.post(path, content=json.dumps(body(path, **fields)), headers=JSON)
        assert response.status_code == 400, fields
        error = response.json()["error"]
        assert (error["param"], error["type"]) == (param, "invalid_request_error")
        assert says in error["message"]
    assert talker.replicas[0].requests == []


async def test_an_explosive_grammar_delays_nobody_else(talker: Server) -> None:
    intersection = " & ".join(f"/(.*a.{{{i}}}.*)/" for i in range(1, 30))
    grammar = f"start: T\nT: {intersection}"
    explosive = asyncio.create_task(talker.client.post(CHAT, json=body(CHAT, guided_grammar=grammar)))
    for _ in range(5):
        await ask(talker, CHAT)
    assert not explosive.done()
    response = await explosive
    assert response.status_code == 400
    assert "too much work" in response.json()["error"]["message"]


async def test_a_model_without_an_end_token(talker: Server) -> None:
    generator = talker.service.generator
    object.__setattr__(generator.model, "eos_token_ids", ())
    response = await talker.client.post(CHAT, json=body(CHAT, guided_regex="a"))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "guided_regex"
    assert "no token to end" in response.json()["error"]["message"]


async def test_the_document_names_every_field(talker: Server) -> None:
    schemas = (await talker.client.get("/openapi.json")).json()["components"]["schemas"]
    assert set(schemas["StructuredOutputs"]["properties"]) == {"json", "regex", "choice", "grammar", "json_object"}
    assert "schema" in schemas["JsonSchemaFormat"]["properties"]
    for name in ("ChatRequest", "CompletionRequest"):
        named = set(schemas[name]["properties"])
        assert {"response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice"} < named
