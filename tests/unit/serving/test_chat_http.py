"""/v1/chat/completions and what stands around it, over real HTTP."""

from __future__ import annotations

import json
from typing import Any

import httpx

HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = "Grüße, 世界! 👩‍👩‍👧 The end of the line. STOP and more."
PROMPT_TOKENS = len("user\nHi\nassistant\n") + 3


async def stream(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """All chunks; the last event must be [DONE]."""
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


async def test_a_whole_answer(server: Any) -> None:
    response = await server.client.post("/v1/chat/completions", json=HELLO)
    answer = response.json()
    assert response.status_code == 200
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["system_fingerprint"] == "fp_test"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": TEXT,
                "reasoning_content": None,
                "refusal": None,
                "annotations": [],
            },
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    num_tokens = len(TEXT.encode()) + 1
    assert answer["usage"]["prompt_tokens"] == PROMPT_TOKENS
    assert answer["usage"]["completion_tokens"] == num_tokens
    assert answer["usage"]["total_tokens"] == PROMPT_TOKENS + num_tokens
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    again = (await server.client.post("/v1/chat/completions", json=HELLO)).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == PROMPT_TOKENS // 4 * 4


async def test_a_stream_is_the_whole_answer_in_whole_characters(server: Any) -> None:
    body = {**HELLO, "stream_options": {"include_usage": True}}
    chunks = await stream(server.client, "/v1/chat/completions", body)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert len({chunk["id"] for chunk in chunks}) == 1
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]]
    assert reasons[-1] == "stop"
    assert not any(reasons[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(TEXT.encode()) + 1
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_usage_is_streamed_only_when_asked_for(server: Any) -> None:
    chunks = await stream(server.client, "/v1/chat/completions", HELLO)
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)


async def test_several_choices(server: Any) -> None:
    answer = (await server.client.post("/v1/chat/completions", json={**HELLO, "n": 3, "max_tokens": 5})).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in answer["choices"]} == {
        TEXT.encode()[:5].decode("utf-8", "replace")
    }
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] == 15
    assert answer["usage"]["prompt_tokens"] == PROMPT_TOKENS
    chunks = await stream(server.client, "/v1/chat/completions", {**HELLO, "n": 2, "max_tokens": 5})
    ends = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1]
    seeds = {request.seed for request in server.replicas[0].requests}
    assert len(seeds) == 5


async def test_stop_strings_end_the_text_and_the_sequence(server: Any) -> None:
    for extra, ending in (({}, ""), ({"include_stop_str_in_output": True}, "STOP")):
        body = {**HELLO, "stop": ["STOP", "never"], **extra}
        answer = (await server.client.post("/v1/chat/completions", json=body)).json()
        (choice,) = answer["choices"]
        assert choice["message"]["content"] == TEXT[: TEXT.index("STOP")] + ending
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "STOP")
        assert answer["usage"]["completion_tokens"] == len(TEXT[: TEXT.index("STOP") + 4].encode())
        chunks = await stream(server.client, "/v1/chat/completions", body)
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert text == choice["message"]["content"]
    assert server.is_idle()


async def test_stop_token_ids(server: Any) -> None:
    comma = server.tokenizer.encode(",")[0]
    answer = (await server.client.post("/v1/chat/completions", json={**HELLO, "stop_token_ids": [comma]})).json()
    assert answer["choices"][0]["message"]["content"] == "Grüße"
    assert answer["choices"][0]["stop_reason"] == comma


async def test_logprobs(server: Any) -> None:
    body = {**HELLO, "max_tokens": 3, "logprobs": True, "top_logprobs": 3}
    (choice,) = (await server.client.post("/v1/chat/completions", json=body)).json()["choices"]
    entries = choice["logprobs"]["content"]
    assert [entry["bytes"] for entry in entries] == [[byte] for byte in TEXT.encode()[:3]]
    assert [entry["logprob"] for entry in entries] == [-0.25] * 3
    assert len(entries[0]["top_logprobs"]) == 3
    assert entries[0]["top_logprobs"][2]["logprob"] == -9999.0
    chunks = await stream(server.client, "/v1/chat/completions", body)
    streamed = [c["choices"][0]["logprobs"]["content"][0] for c in chunks if c["choices"][0]["logprobs"]]
    assert streamed == entries


async def test_prompt_logprobs(server: Any) -> None:
    answer = (
        await server.client.post("/v1/chat/completions", json={**HELLO, "max_tokens": 1, "prompt_logprobs": 0})
    ).json()
    assert answer["prompt_logprobs"][0] is None
    assert len(answer["prompt_logprobs"]) == PROMPT_TOKENS


async def test_messages_in_parts_and_the_developer_role(server: Any) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
    ]
    answer = (await server.client.post("/tokenize", json={"messages": messages})).json()
    text = (await server.client.post("/detokenize", json={"tokens": answer["tokens"]})).json()["prompt"]
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA\nB<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_models(server: Any) -> None:
    listing = (await server.client.get("/v1/models")).json()
    assert listing["object"] == "list"
    assert [card["id"] for card in listing["data"]] == ["tiny"]
    assert (await server.client.get("/v1/models/tiny")).json() == listing["data"][0]
    assert (await server.client.get("/v1/models/other")).status_code == 404
