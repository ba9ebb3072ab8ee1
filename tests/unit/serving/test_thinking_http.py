"""What a model thinks, over real HTTP: beside its answer, in a stream as in one piece."""

from __future__ import annotations

import json
from typing import Any

import pytest

CHAT = "/v1/chat/completions"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
REASONING = "Grüße?\n\nAh, 世界."
CONTENT = "Grüße, 世界! STOP and <b>more</b>.\n"
NUM_REASONING = 2 + len(f"\n{REASONING}\n".encode())  # the tags are a token each
NUM_TOKENS = NUM_REASONING + len(f"\n\n{CONTENT}".encode()) + 1


async def stream(server: Any, **body: Any) -> list[dict[str, Any]]:
    """The chunks' only choices."""
    async with server.client.stream("POST", CHAT, json={**HELLO, **body, "stream": True}) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    return [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]


def joined(chunks: list[dict[str, Any]], kind: str) -> str:
    return "".join(chunk["delta"].get(kind, "") for chunk in chunks)


async def ask(server: Any, **body: Any) -> dict[str, Any]:
    response = await server.client.post(CHAT, json={**HELLO, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def test_reasoning_stands_beside_the_answer(thinkers: Any) -> None:
    answer = await ask(thinkers)
    (choice,) = answer["choices"]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == (REASONING, CONTENT)
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == NUM_REASONING
    assert answer["usage"]["completion_tokens"] == NUM_TOKENS


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"max_tokens": 9},
        {"max_tokens": NUM_REASONING},
        {"max_tokens": NUM_REASONING + 1},
        {"stop": "Ah"},
        {"stop": ["STOP"], "logprobs": True},
        {"include_reasoning": False, "logprobs": True},
        {"enable_thinking": False},
        {"chat_template_kwargs": {"opens": True}},
    ],
    ids=str,
)
async def test_a_stream_is_the_whole_answer(thinkers: Any, body: dict[str, Any]) -> None:
    (whole,) = (await ask(thinkers, **body))["choices"]
    chunks = await stream(thinkers, **body)
    message = whole["message"]
    assert joined(chunks, "reasoning_content") == (message["reasoning_content"] or "")
    assert joined(chunks, "content") == message["content"]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]
    entries = [entry for chunk in chunks for entry in (chunk["logprobs"] or {"content": []})["content"]]
    assert entries == (whole["logprobs"] or {"content": []})["content"]
    kinds = [kind for chunk in chunks[1:] for kind in chunk["delta"] if chunk["delta"][kind]]
    assert kinds == sorted(kinds, reverse=True)  # all that is thought comes before all that is said


async def test_an_answer_cut_off_within_a_block_is_reasoning_alone(thinkers: Any) -> None:
    answer = await ask(thinkers, max_tokens=len("\nGrü".encode()) + 1)
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Grü", "")
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == answer["usage"]["completion_tokens"]


async def test_reasoning_can_be_left_out(thinkers: Any) -> None:
    answer = await ask(thinkers, include_reasoning=False)
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (None, CONTENT)
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == NUM_REASONING


async def test_a_replica_dies_while_it_thinks(thinkers: Any) -> None:
    for replica in thinkers.replicas:
        replica.deltas_until_death = 12
    chunks = await stream(thinkers, thinking_budget=99)
    assert (joined(chunks, "reasoning_content"), joined(chunks, "content")) == (REASONING, CONTENT)
    resumed = [r for replica in thinkers.replicas for r in replica.requests if r.output_token_ids]
    assert resumed
    assert {r.sampling.thinking_budget for r in resumed} == {99}
    assert all(r.sampling.thinking == thinkers.tokenizer.thinking for r in resumed)


async def test_the_template_hears_of_it_by_either_name(thinkers: Any) -> None:
    closed = thinkers.tokenizer.encode("<think>\n\n</think>\n\n")
    for body in (
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": False}},
        {},
        {"enable_thinking": True},
    ):
        await ask(thinkers, **body)
        (last,) = [replica.requests.pop() for replica in thinkers.replicas if replica.requests]
        is_off = "False" in str(body)
        assert (list(last.prompt_token_ids[-len(closed) :]) == closed) == is_off


async def test_the_ranks_are_told_the_budget(thinkers: Any) -> None:
    for extra, starts_open in (({}, False), ({"chat_template_kwargs": {"opens": True}}, True)):
        await ask(thinkers, thinking_budget=7, **extra)
        (last,) = [replica.requests.pop() for replica in thinkers.replicas if replica.requests]
        assert last.sampling.thinking_budget == 7
        assert last.sampling.thinking.starts_open == starts_open


async def test_reasoning_in_the_history_reaches_the_template(thinkers: Any) -> None:
    for name in ("reasoning_content", "reasoning"):
        said = {"role": "assistant", "content": "So.", name: "Hm."}
        body = {"messages": [*HELLO["messages"], said], "add_generation_prompt": False}
        tokens = (await thinkers.client.post("/tokenize", json=body)).json()["tokens"]
        text = thinkers.tokenizer.decode(tokens, skip_special_tokens=False)
        assert text.endswith("<|im_start|>assistant\n<think>\nHm.\n</think>\n\nSo.<|im_end|>\n")


async def test_completions_continue_with_all_that_is_said(thinkers: Any) -> None:
    answer = (await thinkers.client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 300})).json()
    assert answer["choices"][0]["text"] == f"<think>\n{REASONING}\n</think>\n\n{CONTENT}"
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"thinking_budget": -1}, "thinking_budget", "between 0 and"),
        ({"thinking_budget": "5"}, "thinking_budget", "valid integer"),
        ({"chat_template_kwargs": {"opens": True}, "enable_thinking": False}, "enable_thinking", "always thinks"),
        ({"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False}, None, "contradicts"),
        ({"separate_reasoning": True}, "separate_reasoning", "Unknown field"),
    ],
    ids=str,
)
async def test_what_cannot_be_is_refused(thinkers: Any, body: dict[str, Any], param: str | None, says: str) -> None:
    response = await thinkers.client.post(CHAT, json={**HELLO, **body})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert says in response.json()["error"]["message"]


@pytest.mark.parametrize("body", [{"thinking_budget": 5}, {"enable_thinking": True}], ids=str)
async def test_a_model_that_does_not_think(server: Any, body: dict[str, Any]) -> None:
    response = await server.client.post(CHAT, json={**HELLO, **body})
    (param,) = body
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert "does not think" in response.json()["error"]["message"]
    answer = (await server.client.post(CHAT, json={**HELLO, "enable_thinking": False})).json()
    assert answer["choices"][0]["message"]["content"] == server.text
