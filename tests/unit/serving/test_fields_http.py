"""Fields of chat and completions over real HTTP, each in a test that fails where it is ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from qwen_ray.serving.routes import create_app

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
OPENING = "<|im_start|>assistant\n"


async def post(server: Any, path: str, **body: Any) -> dict[str, Any]:
    response = await server.client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def stream(server: Any, path: str, **body: Any) -> list[dict[str, Any]]:
    async with server.client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    return [json.loads(line) for line in lines[:-1]]


async def prompt_of(server: Any, **body: Any) -> str:
    await post(server, CHAT, **{**HI, "max_tokens": 1, **body})
    return server.tokenizer.decode(server.replicas[0].requests[-1].prompt_token_ids, skip_special_tokens=False)


async def test_answers_are_openai_s_own(server: Any) -> None:
    """Every field that OpenAI's models must have is there, and is what they say."""
    answer = await post(server, CHAT, **HI, logprobs=True, top_logprobs=2)
    ChatCompletion.model_validate(answer, strict=True)
    message = answer["choices"][0]["message"]
    assert (message["refusal"], message["annotations"], message["role"]) == (None, [], "assistant")
    assert (answer["service_tier"], answer["system_fingerprint"]) == ("default", "fp_test")
    assert answer["id"].startswith("chatcmpl-")
    assert {"cached_tokens"} <= set(answer["usage"]["prompt_tokens_details"])
    assert {"reasoning_tokens"} <= set(answer["usage"]["completion_tokens_details"])
    for chunk in await stream(server, CHAT, **HI, stream_options={"include_usage": True}):
        ChatCompletionChunk.model_validate(chunk, strict=True)
    text = await post(server, COMPLETIONS, prompt="x", logprobs=1, echo=True)
    assert text["id"].startswith("cmpl-")
    text["choices"][0]["logprobs"]["token_logprobs"][0] = 0.0  # OpenAI's too is null; its model does not say so
    text["choices"][0]["logprobs"]["top_logprobs"][0] = {}
    Completion.model_validate(text, strict=True)


async def test_there_is_one_tier(server: Any) -> None:
    assert (await post(server, CHAT, **HI, service_tier="auto"))["service_tier"] == "default"
    chunks = await stream(server, CHAT, **HI, service_tier="default", max_tokens=2)
    assert {chunk["service_tier"] for chunk in chunks} == {"default"}


async def test_what_says_nothing_of_the_answer_is_taken(server: Any) -> None:
    plain = await post(server, CHAT, **HI, max_tokens=5)
    given = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "modalities": ["text"],
    }
    assert (await post(server, CHAT, **HI, max_tokens=5, **given))["choices"] == plain["choices"]
    body = {"prompt": "x", "user": "u", "metadata": {}, "best_of": 1}
    assert (await post(server, COMPLETIONS, **body))["choices"]


async def test_null_is_as_good_as_nothing(server: Any) -> None:
    models = create_app(server.service).openapi()["components"]["schemas"]
    for path, model, needed in ((CHAT, "ChatRequest", HI), (COMPLETIONS, "CompletionRequest", {"prompt": "Hi"})):
        optional = set(models[model]["properties"]) - set(needed) - {"max_tokens", "max_completion_tokens"}
        assert {"n", "stream", "logprobs", "stop", "logit_bias", "priority"} <= optional
        for name in optional:
            kinds = models[model]["properties"][name].get("anyOf", [])
            assert {"type": "null"} in kinds, name
        plain = await post(server, path, **needed, max_tokens=4)
        nulls = await post(server, path, **needed, max_tokens=4, **dict.fromkeys(optional))
        assert nulls["choices"] == plain["choices"]


async def test_events_are_not_padded(server: Any) -> None:
    options = {"include_usage": True, "include_obfuscation": False}
    assert (await stream(server, CHAT, **HI, max_tokens=2, stream_options=options))[-1]["usage"]
    body = {**HI, "stream": True, "stream_options": {"include_obfuscation": True}}
    response = await server.client.post(CHAT, json=body)
    assert response.json()["error"]["param"] == "stream_options.include_obfuscation"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url", "refusal"])
async def test_parts_that_are_no_text_are_named(server: Any, kind: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "x"}}]
    for path in (CHAT, "/tokenize"):
        response = await server.client.post(path, json={"messages": [{"role": "user", "content": parts}]})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "messages.0.content")
        assert f"part 1 is of type '{kind}'" in error["message"]


async def test_add_generation_prompt(server: Any) -> None:
    assert (await prompt_of(server)).endswith(OPENING)
    assert (await prompt_of(server, add_generation_prompt=True)).endswith(OPENING)
    assert not (await prompt_of(server, add_generation_prompt=False)).endswith(OPENING)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"continue_final_message": True}, {}),
        ({"continue_final_message": True, "add_generation_prompt": False}, {}),
        ({}, {"prefix": True}),
        ({}, {"partial": True}),
    ],
    ids=str,
)
async def test_the_last_message_goes_on(server: Any, extra: dict[str, Any], message: dict[str, Any]) -> None:
    said = [*HI["messages"], {"role": "assistant", "content": "So I\n say ", **message}]
    whole = f"<|im_start|>user\nHi<|im_end|>\n{OPENING}So I\n say "
    assert await prompt_of(server, messages=said, **extra) == whole
    tokens = (await post(server, "/tokenize", messages=said, **extra))["tokens"]
    assert server.tokenizer.decode(tokens, skip_special_tokens=False) == whole
    answer = await post(server, CHAT, messages=said, **extra)
    assert answer["choices"][0]["message"]["content"] == server.text  # what is new, and no more


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"continue_final_message": True}, "messages"),
        ({"messages": [{"role": "user", "content": "Hi", "prefix": True}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a", "prefix": True}, *HI["messages"]]}, "messages"),
        (
            {
                "messages": [{"role": "assistant", "content": "a"}],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
            "add_generation_prompt",
        ),
        ({"chat_template_kwargs": {"continue_final_message": True}}, "chat_template_kwargs"),
        ({"chat_template": "x"}, "chat_template"),
    ],
    ids=str,
)
async def test_prompts_that_cannot_be(server: Any, body: dict[str, Any], param: str) -> None:
    for path in (CHAT, "/tokenize"):
        if path == "/tokenize" and param == "chat_template":
            continue
        response = await server.client.post(path, json={**HI, **body})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def test_token_ids_of_chats(server: Any) -> None:
    answer = await post(server, CHAT, **HI, max_tokens=3, n=2, return_token_ids=True)
    prompt = list(server.replicas[0].requests[-1].prompt_token_ids)
    expected = server.tokenizer.encode(server.text)[:3]
    assert answer["prompt_token_ids"] == prompt
    assert [choice["token_ids"] for choice in answer["choices"]] == [expected, expected]
    chunks = await stream(server, CHAT, **HI, max_tokens=3, return_token_ids=True)
    assert chunks[0]["prompt_token_ids"] == prompt
    assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())] == expected
    plain = await post(server, CHAT, **HI, max_tokens=3)
    assert "token_ids" not in str(plain)


async def test_token_ids_of_completions(server: Any) -> None:
    encode = server.tokenizer.encode
    body = {"prompt": ["ab", "c"], "max_tokens": 3, "return_token_ids": True}
    choices = (await post(server, COMPLETIONS, **body))["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [encode("ab"), encode("c")]
    assert [choice["token_ids"] for choice in choices] == [encode(server.text)[:3]] * 2
    chunks = await stream(server, COMPLETIONS, **body)
    for index, choice in enumerate(choices):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert [token for one in own for token in one["token_ids"]] == choice["token_ids"]
        assert [one["prompt_token_ids"] for one in own if "prompt_token_ids" in one] == [choice["prompt_token_ids"]]
    (echoed,) = (await post(server, COMPLETIONS, prompt="ab", max_tokens=0, echo=True, return_token_ids=True))[
        "choices"
    ]
    assert (echoed["text"], echoed["token_ids"], echoed["prompt_token_ids"]) == ("ab", [], encode("ab"))


async def test_prompt_logprobs_of_a_stream_that_begins_within_a_character(server: Any) -> None:
    server.replicas[0].ranks.tokens = server.tokenizer.encode("世!")
    chunks = await stream(server, COMPLETIONS, prompt="abc", max_tokens=3, prompt_logprobs=0)
    entries = [c["choices"][0]["prompt_logprobs"] for c in chunks if "prompt_logprobs" in c["choices"][0]]
    assert [len(entry) for entry in entries] == [3]


async def test_log_likelihoods_as_lm_eval_asks_for_them(server: Any) -> None:
    encode = server.tokenizer.encode
    prompts = [encode("Grüße, 世"), encode("ab")]
    for max_tokens in (0, 1):
        body = {"prompt": prompts, "max_tokens": max_tokens, "echo": True, "logprobs": 1, "temperature": 0, "seed": 1}
        choices = (await post(server, COMPLETIONS, **body))["choices"]
        assert [choice["index"] for choice in choices] == [0, 1]
        for choice, prompt in zip(choices, prompts, strict=True):
            shown = choice["logprobs"]
            assert len(shown["tokens"]) == len(prompt) + max_tokens
            assert shown["token_logprobs"] == [None] + [-0.25] * (len(prompt) + max_tokens - 1)
            assert all(max(top.values()) == -0.25 for top in shown["top_logprobs"][1:])
            assert (await post(server, "/tokenize", prompt="ab", add_special_tokens=False))["tokens"] == encode("ab")
    shown = choices[0]["logprobs"]
    assert shown["tokens"][2:4] == ["bytes:\\xc3", "bytes:\\xbc"]  # each its own, not both U+FFFD
    assert shown["text_offset"][:6] == [0, 1, 2, 2, 3, 3]


async def test_what_a_remote_tokenizer_is_told(server: Any) -> None:
    told = (await server.client.get("/tokenizer_info")).json()
    assert told["eos_token"] == "<|im_end|>"
    assert told["bos_token"] is told["pad_token"] is None
    assert told["chat_template"].startswith("{% for m in messages %}")
    assert (told["vocab_size"], told["model_max_length"]) == (server.tokenizer.vocab_size, 400)
    tokens = (await post(server, "/tokenize", prompt=told["eos_token"], add_special_tokens=False))["tokens"]
    assert (await post(server, "/detokenize", tokens=tokens))["prompt"] == told["eos_token"]


def test_the_document(server: Any) -> None:
    document = create_app(server.service).openapi()
    assert json.loads(json.dumps(document)) == document
    assert "422" not in json.dumps(document)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            error = operation["responses"]["4XX"]["content"]["application/json"]["schema"]
            assert error == {"$ref": "#/components/schemas/ErrorAnswer"}, path
            assert operation["description"], path
            for content in operation["responses"]["200"]["content"].values():
                assert content["schema"].get("$ref") or content["schema"]["type"], path
    models = document["components"]["schemas"]
    fields = models["ChatRequest"]["properties"]
    assert {"tools", "tool_choice", "parallel_tool_calls", "continue_final_message", "return_token_ids"} <= set(fields)
    assert "suffix" in models["CompletionRequest"]["properties"]
    assert "chat_template" not in fields
    assert {"type": "string"} in models["CompletionRequest"]["properties"]["stop"]["anyOf"]
    assert "text/event-stream" in document["paths"][CHAT]["post"]["responses"]["200"]["content"]
    assert "tool_calls" in models["AnswerMessage"]["properties"]
    assert "/tokenizer_info" in document["paths"]
    assert list(document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]
