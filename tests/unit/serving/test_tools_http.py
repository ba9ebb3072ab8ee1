"""Tools over real HTTP: what the model is told of them, how its calls come back, whole and in a stream."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, pydantic_function_tool
from pydantic import BaseModel

from qwen_ray.core.plan import EngineConfig
from qwen_ray.serving.tool_schema import MAX_TOOL_BYTES, MAX_TOOLS
from qwen_ray.text.tokenizer import Tokenizer
from tests.unit.serving.conftest import EOS, THINKING_TEMPLATE, Server, write_tokenizer

CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "in <a city>", "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "tools": [WEATHER, CLOCK]}
CALLS = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "世界", "days": 3}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)
SPOKEN = [("weather", '{"city": "世界", "days": 3}'), ("clock", "{}")]
CODER_CALLS = (
    "<tool_call>\n<function=weather>\n<parameter=city>\n世界\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>\n</tool_call>\n<tool_call>\n<function=clock>\n</function>\n</tool_call>"
)
CODER_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} as <function=NAME><parameter=KEY>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "\n<function={{ c.function.name }}>{% for k, v in c.function.arguments | items %}<{{ k }}={{ v }}>{% endfor %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def engine_config() -> EngineConfig:
    return EngineConfig(num_blocks=2000, block_size=4, max_model_len=4000, max_num_waiting=8, max_num_seqs=8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("hermes"), THINKING_TEMPLATE))


@pytest.fixture
async def coder(tmp_path: Path, engine_config: EngineConfig) -> Any:
    server = Server(Tokenizer.load(write_tokenizer(tmp_path, CODER_TEMPLATE)), engine_config, CODER_CALLS)
    yield await server.start(num_replicas=1)
    await server.stop()


def let_say(server: Any, text: str) -> None:
    for replica in server.replicas:
        replica.ranks.tokens = [*server.tokenizer.encode(text), EOS]


async def ask(server: Any, **body: Any) -> dict[str, Any]:
    """The choice."""
    response = await server.client.post(CHAT, json={**HELLO, **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


async def stream(server: Any, **body: Any) -> list[dict[str, Any]]:
    async with server.client.stream("POST", CHAT, json={**HELLO, **body, "stream": True}) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]


def joined(chunks: list[dict[str, Any]]) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls, as a client puts them together."""
    content = ""
    calls: list[tuple[str, str]] = []
    ids: set[str] = set()
    for delta in (chunk["delta"] for chunk in chunks):
        content += delta.get("content") or ""
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(calls)
                assert call["type"] == "function"
                assert set(call) == {"index", "id", "type", "function"}
                assert call["function"]["arguments"] == ""
                assert re.fullmatch(r"call_[0-9a-f]{24}", call["id"])
                ids.add(call["id"])
                calls.append((call["function"]["name"], ""))
            else:
                assert set(call) == {"index", "function"}
                name, arguments = calls[call["index"]]
                calls[call["index"]] = (name, arguments + call["function"]["arguments"])
    assert len(ids) == len(calls)
    return content, calls


def spoken(choice: dict[str, Any]) -> list[tuple[str, str]]:
    return [(c["function"]["name"], c["function"]["arguments"]) for c in choice["message"].get("tool_calls", ())]


async def prompt_of(server: Any, **body: Any) -> str:
    await ask(server, max_tokens=1, **body)
    tokens = server.replicas[0].requests[-1].prompt_token_ids
    return server.tokenizer.decode(tokens, skip_special_tokens=False)


async def test_calls_in_one_piece(server: Any) -> None:
    let_say(server, f"Wait.\n{CALLS}\n")
    choice = await ask(server)
    message = choice["message"]
    assert (message["content"], choice["finish_reason"], choice["stop_reason"]) == ("Wait.", "tool_calls", None)
    assert spoken(choice) == SPOKEN
    assert all(re.fullmatch(r"call_[0-9a-f]{24}", call["id"]) for call in message["tool_calls"])
    assert {call["type"] for call in message["tool_calls"]} == {"function"}
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    let_say(server, CALLS)
    assert (await ask(server))["message"]["content"] is None


@pytest.mark.parametrize(
    ("text", "body", "reason"),
    [
        (f"Wait.\n{CALLS}\n", {}, "tool_calls"),
        (f"<think>\n{CALLS}\n</think>\n\n{CALLS}", {}, "tool_calls"),
        (CALLS, {"max_tokens": 60}, "length"),
        (CALLS, {"logprobs": True, "return_token_ids": True}, "tool_calls"),
        (CALLS, {"stop": "days"}, "stop"),
        (CALLS, {"parallel_tool_calls": False}, "tool_calls"),
        (CALLS, {"tool_choice": "none"}, "stop"),
        ('<tool_call>\n{"name": "weather", "arguments": \n</tool_call> or so', {}, "stop"),
        ('<tool_call>{"arguments": {"a": 1}, "name": "clock"}', {}, "tool_calls"),
    ],
    ids=str,
)
async def test_a_stream_is_the_whole_answer(server: Any, text: str, body: dict[str, Any], reason: str) -> None:
    let_say(server, text)
    choice = await ask(server, **body)
    chunks = await stream(server, **body)
    content, calls = joined(chunks)
    assert content == (choice["message"]["content"] or "")
    assert calls == spoken(choice)
    assert chunks[-1]["finish_reason"] == choice["finish_reason"] == reason
    if "logprobs" in body:
        entries = [entry for chunk in chunks for entry in (chunk["logprobs"] or {"content": []})["content"]]
        assert entries == choice["logprobs"]["content"]
        assert [token for chunk in chunks for token in chunk.get("token_ids", ())] == choice["token_ids"]


async def test_arguments_are_streamed_as_they_come(server: Any) -> None:
    let_say(server, CALLS)
    deltas = [chunk["delta"] for chunk in await stream(server)]
    assert sum("tool_calls" in delta for delta in deltas) > 10


async def test_what_is_no_call_is_content(server: Any) -> None:
    text = 'So <tool_call>\n{"name": weather}\n</tool_call>\n'
    let_say(server, text)
    choice = await ask(server)
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    assert "tool_calls" not in choice["message"]


async def test_without_tools_and_with_none_of_them_all_is_text(server: Any) -> None:
    let_say(server, CALLS)
    for body in ({"tools": None}, {"tools": []}, {"tool_choice": "none"}):
        choice = await ask(server, **body)
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALLS, "stop")
        assert "weather" not in await prompt_of(server, **body)


async def test_one_call_and_no_more(server: Any) -> None:
    let_say(server, CALLS + "and so on")
    for extra, count in (({}, 2), ({"parallel_tool_calls": True}, 2), ({"parallel_tool_calls": False}, 1)):
        response = await server.client.post(CHAT, json={**HELLO, **extra})
        (choice,) = response.json()["choices"]
        assert spoken(choice) == SPOKEN[:count]
    num_tokens = len(CALLS[: CALLS.index("</tool_call>") + len("</tool_call>")].encode())
    assert response.json()["usage"]["completion_tokens"] == num_tokens
    await server.until(server.is_idle)


async def test_what_the_model_is_told(server: Any) -> None:
    prompt = await prompt_of(server)
    assert f"<tools>\n{json.dumps(WEATHER)}\n{json.dumps(CLOCK)}\n</tools>" in prompt
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"A & B"}'}}
    said = {"role": "assistant", "content": None, "tool_calls": [call, {**call, "id": "call_2", "index": 1}]}
    results = [
        {"role": "tool", "tool_call_id": f"call_{i}", "content": [{"type": "text", "text": "sun"}]} for i in (1, 2)
    ]
    prompt = await prompt_of(server, messages=[*HELLO["messages"], said, *results])
    written = '<tool_call>\n{"name": "weather", "arguments": {"city": "A & B"}}\n</tool_call>'
    assert f"{written}\n{written}<|im_end|>" in prompt
    assert prompt.count("<tool_response>\nsun\n</tool_response>") == 2
    body = {"messages": [*HELLO["messages"], said], "tools": [CLOCK]}
    tokens = (await server.client.post("/tokenize", json=body)).json()["tokens"]
    text = server.tokenizer.decode(tokens, skip_special_tokens=False)
    assert written in text
    assert json.dumps(CLOCK) in text


async def test_the_coder_s_markup(coder: Any) -> None:
    choice = await ask(coder)
    assert (spoken(choice), choice["message"]["content"], choice["finish_reason"]) == (SPOKEN, None, "tool_calls")
    assert joined(await stream(coder)) == ("", SPOKEN)
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oz", "days": 2}'}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert "<function=weather><city=Oz><days=2>" in await prompt_of(coder, messages=[*HELLO["messages"], said])


async def test_a_call_goes_on_at_another_replica(tokenizer: Tokenizer, engine_config: EngineConfig) -> None:
    server = await Server(tokenizer, engine_config, f"Wait.\n{CALLS}").start(num_replicas=2)
    try:
        for deaths in (30, 55, 100):
            for replica in server.replicas:
                replica.deltas_until_death = deaths
            assert joined(await stream(server)) == ("Wait.", SPOKEN)
        assert any(request.output_token_ids for replica in server.replicas for request in replica.requests)
    finally:
        await server.stop()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"tool_choice": "required"}, "only"),
        ({"tool_choice": {"type": "function", "function": {"name": "clock"}}}, "named"),
        ({"tools": [{"type": "function", "function": {**WEATHER["function"], "strict": True}}]}, "strict"),
        ({"response_format": {"type": "json_object"}}, "or answer"),
    ],
    ids=str,
)
async def test_ranks_hear_what_an_answer_may_be(server: Any, body: dict[str, Any], kind: str) -> None:
    let_say(server, CALLS)
    calls = spoken(await ask(server, **body))
    assert calls == (SPOKEN[:1] if kind == "named" else SPOKEN)
    grammar = server.replicas[0].requests[-1].sampling.grammar
    assert (grammar.kind, grammar.after_thinking) == ("grammar", True)
    assert ("weather" in grammar.text) == (kind != "named")
    assert ("answer" in grammar.text) == (kind == "or answer")
    assert ("lead" in grammar.text) == (kind == "strict")


async def test_without_need_there_is_no_grammar(server: Any) -> None:
    for body in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}):
        await ask(server, **body)
        assert server.replicas[0].requests[-1].sampling.grammar is None


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}
WRONG: list[tuple[dict[str, Any], int, str | None, str]] = [
    # body, status, param, part of the message
    ({"tools": [CLOCK] * (MAX_TOOLS + 1)}, 413, "tools", "at most 128"),
    ({"tools": [CLOCK, CLOCK]}, 400, "tools", "two functions have the name 'clock'"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, 400, "tools.0.type", "'function'"),
    (function(name="no spaces"), 400, "tools.0.function.name", "pattern"),
    (function(parameters={"x": "y" * MAX_TOOL_BYTES}), 400, "tools.0.function.parameters", "at most 65536"),
    (function(description="y" * (MAX_TOOL_BYTES + 1)), 400, "tools.0.function.description", "at most 65536"),
    (function(parameters={"type": "array"}) | {"tool_choice": "required"}, 400, "tools", "must be 'object'"),
    (function(parameters={"pattern": "("}, strict=1), 400, "tools.0.function.strict", "boolean"),
    (function(strict=True, parameters={"properties": {"a": {"type": "x"}}}), 400, "tools", "a"),
    ({"tool_choice": "any"}, 400, "tool_choice", "'required'"),
    ({"tool_choice": "required", "tools": None}, 400, "tool_choice", "there are no tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, 400, "tool_choice", "has the name 'g'"),
    (
        {"tool_choice": "required", "response_format": {"type": "json_object"}},
        400,
        "response_format",
        "does not go with",
    ),
    ({"guided_json": '{"a":' * 9000 + "1" + "}" * 9000}, 400, "guided_json", "too deep"),
    ({"guided_json": "[]"}, 400, "guided_json", "something can match"),
    ({"guided_json": "{"}, 400, "guided_json", "not valid JSON"),
    ({"guided_regex": "a"}, 400, "guided_regex", "goes with tools only"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, 400, "messages.0", "for messages of role"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, 400, "messages.0", "for messages of role"),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL]}]}, 400, "messages", "function.arguments in JSON"),
    ({"functions": [{"name": "f"}]}, 400, "functions", "not supported"),
]


async def test_what_cannot_be_is_refused(server: Any) -> None:
    for body, status, param, says in WRONG:
        response = await server.client.post(CHAT, json={**HELLO, **body})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (status, param), (body, error)
        assert says in error["message"], (body, error)
    assert server.is_idle()


async def test_a_model_without_tools_says_so(tmp_path: Path, engine_config: EngineConfig) -> None:
    server = Server(Tokenizer.load(write_tokenizer(tmp_path, "{{ messages[0].content }}")), engine_config)
    await server.start(num_replicas=1)
    try:
        response = await server.client.post(CHAT, json=HELLO)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
        assert "calls no tools" in response.json()["error"]["message"]
        assert (await server.client.post(CHAT, json={**HELLO, "tool_choice": "none"})).status_code == 200
    finally:
        await server.stop()


class Weather(BaseModel):
    """Tells it."""

    city: str
    days: int | None = None


async def test_openai_s_own_client(server: Any) -> None:
    """What it makes of a strict model, whole and in a stream, and the conversation that goes on with its objects."""
    let_say(server, '<tool_call>\n{"name": "Weather", "arguments": {"city": "世界", "days": null}}\n</tool_call>')
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        asked: Any = {
            "model": "tiny",
            "messages": HELLO["messages"],
            "tools": [pydantic_function_tool(Weather)],
            "parallel_tool_calls": False,
        }
        whole = await client.chat.completions.parse(**asked)
        async with client.chat.completions.stream(**asked) as events:
            streamed = await events.get_final_completion()
        for completion in (whole, streamed):
            (choice,) = completion.choices
            (call,) = choice.message.tool_calls or []
            assert call.function.parsed_arguments == Weather(city="世界")
            assert choice.finish_reason == "tool_calls"
        message = whole.choices[0].message.model_dump(
            exclude={"parsed": True, "tool_calls": {0: {"function": {"parsed_arguments"}}}}
        )
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sun"}
        let_say(server, "Sun.")
        answer = await client.chat.completions.create(**{**asked, "messages": [*asked["messages"], message, result]})
        assert answer.choices[0].message.content == "Sun."
