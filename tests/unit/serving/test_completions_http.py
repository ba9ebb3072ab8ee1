"""/v1/completions over real HTTP: prompts in every form, echo, log-probabilities in the older shape."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

TEXT = "Grüße, 世界! 👩‍👩‍👧 The end of the line. STOP and more."


async def complete(server: Any, **body: Any) -> dict[str, Any]:
    response = await server.client.post("/v1/completions", json={"model": "tiny", **body})
    assert response.status_code == 200, response.text
    return response.json()


async def test_every_form_of_prompt(server: Any) -> None:
    ids = server.tokenizer.encode("ab")
    for prompt, count in (("ab", 1), (["ab", "c"], 2), (ids, 1), ([ids, [1, 2, 3]], 2)):
        answer = await complete(server, prompt=prompt, max_tokens=2)
        assert answer["object"] == "text_completion"
        assert [choice["text"] for choice in answer["choices"]] == ["Gr"] * count
        assert [choice["index"] for choice in answer["choices"]] == list(range(count))
        assert answer["usage"]["completion_tokens"] == 2 * count


async def test_the_default_is_16_tokens(server: Any) -> None:
    answer = await complete(server, prompt="ab")
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_several_choices_of_several_prompts(server: Any) -> None:
    answer = await complete(server, prompt=["ab", "cde"], n=2, max_tokens=1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 5


async def test_echo_with_logprobs(server: Any) -> None:
    (choice,) = (await complete(server, prompt="abc", max_tokens=2, echo=True, logprobs=1))["choices"]
    assert choice["text"] == "abcGr"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c", "G", "r"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.25, -0.25, -0.25]
    assert choice["logprobs"]["top_logprobs"] == [None, {"b": -0.25}, {"c": -0.25}, {"G": -0.25}, {"r": -0.25}]


async def test_only_echo(server: Any) -> None:
    answer = await complete(server, prompt="abc", max_tokens=0, echo=True, logprobs=0)
    (choice,) = answer["choices"]
    assert choice["text"] == "abc"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert answer["usage"]["completion_tokens"] == 0


async def test_a_stream_gives_what_the_whole_answer_gives(server: Any) -> None:
    body = {"prompt": "abc", "max_tokens": 60, "echo": True, "logprobs": 2, "stop": "the"}
    (whole,) = (await complete(server, **body))["choices"]
    assert whole["text"] == "abc" + TEXT[: TEXT.index("the")]
    async with server.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert events.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert choices[-1]["finish_reason"] == "stop"
    for column in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [entry for choice in choices for entry in choice["logprobs"][column]]
        assert streamed == whole["logprobs"][column]


async def test_tokens_and_back(server: Any) -> None:
    body = {"prompt": "añ", "return_token_strs": True}
    answer = (await server.client.post("/tokenize", json=body)).json()
    assert answer["count"] == 3
    assert answer["max_model_len"] == 400
    assert answer["token_strs"] == ["a", "\ufffd", "\ufffd"]
    back = (await server.client.post("/detokenize", json={"tokens": answer["tokens"]})).json()
    assert back == {"prompt": "añ"}


async def test_prompts_and_answers_are_logged_only_when_asked_for(
    server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="qwen_ray")
    await complete(server, prompt="secret", max_tokens=2)
    assert "secret" not in caplog.text
    server.service.generator._log_requests = True
    await complete(server, prompt="secret", max_tokens=2)
    assert "asks 'secret'" in caplog.text
    assert "gets 'r' length" in caplog.text
