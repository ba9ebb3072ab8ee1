"""/v1/embeddings over real HTTP, with ranks whose vectors are simple: every field that is taken changes something."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
from array import array
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from tokenizers import processors

from qwen_ray.api_keys import ApiKey
from qwen_ray.config import HttpSettings
from qwen_ray.core.pooling import EmbeddingConfig
from qwen_ray.serving import embeddings, pooling
from qwen_ray.serving.audit import AuditLog
from qwen_ray.text.tokenizer import Tokenizer

END = 257
EMBEDDER = {
    "task": "embed",
    "hidden_size": 4,
    "embedding": EmbeddingConfig(prompts={"query": "Q: ", "document": ""}),
}
Start = Callable[..., Awaitable[Any]]


@pytest.fixture(scope="session")
def ending_tokenizer(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One that puts a token behind each text, as Qwen3-Embedding's does."""
    path = tmp_path_factory.mktemp("ending")
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", END)])
    backend.save(str(path / "tokenizer.json"))
    return Tokenizer.load(path)


@pytest.fixture
async def embedder(ending_tokenizer: Tokenizer, start_server: Start) -> Any:
    return await start_server(tokenizer=ending_tokenizer, about=EMBEDDER)


async def embed(server: Any, status: int = 200, **body: Any) -> dict[str, Any]:
    response = await server.client.post("/v1/embeddings", json={"model": "tiny", **body})
    assert response.status_code == status, response.text
    return response.json() if status == 200 else response.json()["error"]


def of(tokens: list[int], *, dimensions: int = 4, normalizes: bool = True) -> list[float]:
    """What the ranks of conftest.py say of a prompt, shaped."""
    vector = [tokens[0] - 100.0, tokens[-1] - 100.0, float(len(tokens)), float(sum(tokens) % 100)][:dimensions]
    length = math.hypot(*vector) if normalizes else 1.0
    return [x / length for x in vector]


def vectors(answer: dict[str, Any]) -> list[Any]:
    assert [item["index"] for item in answer["data"]] == list(range(len(answer["data"])))
    return [item["embedding"] for item in answer["data"]]


def asked(server: Any) -> list[list[int]]:
    """Prompts that came to the replica, in the order of the inputs."""
    requests = server.replicas[0].requests
    return [list(one.prompt_token_ids) for one in sorted(requests, key=lambda one: one.request_id)]


async def test_every_form_of_input(embedder: Any) -> None:
    a, b = ([*embedder.tokenizer.encode(text, False), END] for text in ("hello", "you there"))
    for given, prompts in (
        ("hello", [a]),
        (["hello", "you there"], [a, b]),
        (a[:-1], [a[:-1]]),
        ([a, b, [7]], [a, b, [7]]),
    ):
        answer = await embed(embedder, input=given)
        assert answer["object"] == "list"
        assert answer["model"] == "tiny"
        assert [item["object"] for item in answer["data"]] == ["embedding"] * len(prompts)
        for vector, prompt in zip(vectors(answer), prompts, strict=True):
            assert vector == pytest.approx(of(prompt), abs=1e-6)
        num_tokens = sum(map(len, prompts))
        assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


async def test_dimensions_are_the_first_and_of_length_1(embedder: Any) -> None:
    for dimensions in (1, 3, 4):
        (vector,) = vectors(await embed(embedder, input=[5, 6, 7], dimensions=dimensions))
        assert vector == pytest.approx(of([5, 6, 7], dimensions=dimensions), abs=1e-6)
        assert math.hypot(*vector) == pytest.approx(1, abs=1e-6)
    for dimensions in (0, 5, "3"):
        error = await embed(embedder, 400, input=[5, 6, 7], dimensions=dimensions)
        assert error["param"] == "dimensions"


async def test_base64_is_the_same_as_float32(embedder: Any) -> None:
    (vector,) = vectors(await embed(embedder, input="hello"))
    (encoded,) = vectors(await embed(embedder, input="hello", encoding_format="base64"))
    assert list(array("f", base64.b64decode(encoded))) == vector
    assert (await embed(embedder, 400, input="hello", encoding_format="hex"))["param"] == "encoding_format"


async def test_without_activation_vectors_are_as_they_are(embedder: Any) -> None:
    answer = await embed(embedder, input=[5, 6, 7], use_activation=False, dimensions=3)
    assert vectors(answer) == [of([5, 6, 7], dimensions=3, normalizes=False)]


async def test_a_model_s_own_normalization_is_the_default(ending_tokenizer: Tokenizer, start_server: Start) -> None:
    about = {**EMBEDDER, "embedding": EmbeddingConfig(normalizes=False)}
    server = await start_server(tokenizer=ending_tokenizer, about=about)
    assert vectors(await embed(server, input=[5, 6])) == [of([5, 6], normalizes=False)]
    assert vectors(await embed(server, input=[5, 6], use_activation=True))[0] == pytest.approx(of([5, 6]), abs=1e-6)


async def test_an_instruction_goes_before_each_text(embedder: Any) -> None:
    await embed(embedder, input=["a", "b"], instruction="Find it")
    assert [embedder.tokenizer.decode(ids) for ids in asked(embedder)] == [
        "Instruct: Find it\nQuery:a",
        "Instruct: Find it\nQuery:b",
    ]


async def test_a_prompt_of_the_checkpoint_goes_before_each_text(embedder: Any) -> None:
    await embed(embedder, input="a", prompt_name="query")
    assert embedder.tokenizer.decode(asked(embedder)[0]) == "Q: a"
    assert "query, document" in (await embed(embedder, 400, input="a", prompt_name="other"))["message"]
    for given in ({"instruction": "x", "prompt_name": "query", "input": "a"}, {"instruction": "x", "input": [1]}):
        await embed(embedder, 400, **given)


async def test_a_checkpoint_s_default_prompt(ending_tokenizer: Tokenizer, start_server: Start) -> None:
    config = EmbeddingConfig(prompts={"query": "Q: ", "document": "D: "}, default_prompt_name="document")
    server = await start_server(tokenizer=ending_tokenizer, about={**EMBEDDER, "embedding": config})
    await embed(server, input="a")
    assert server.tokenizer.decode(asked(server)[0]) == "D: a"


async def test_special_tokens_are_the_model_s_unless_told(embedder: Any) -> None:
    await embed(embedder, input="ab", add_special_tokens=False)
    assert asked(embedder) == [embedder.tokenizer.encode("ab", False)]


async def test_what_is_too_long_is_refused_or_cut(embedder: Any) -> None:
    text = "abc" * 200
    error = await embed(embedder, 400, input=["a", text])
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "input"
    ids = embedder.tokenizer.encode(text, False)
    for given, kept in (
        ({"truncate_prompt_tokens": -1}, [*ids[:399], END]),
        ({"truncate_prompt_tokens": 10}, [*ids[:9], END]),
        ({"truncate_prompt_tokens": 10, "truncation_side": "left"}, [*ids[-9:], END]),
    ):
        embedder.replicas[0].requests.clear()
        await embed(embedder, input=text, **given)
        assert asked(embedder) == [kept]
    embedder.replicas[0].requests.clear()
    await embed(embedder, input=[[1, 2, 3]], truncate_prompt_tokens=2)
    assert asked(embedder) == [[1, 2]]
    await embed(embedder, 400, input="a", truncate_prompt_tokens=0)


async def test_the_whole_context_is_for_the_prompt(embedder: Any) -> None:
    prompt = [1] * embedder.config.max_model_len
    assert vectors(await embed(embedder, input=[prompt]))[0] == pytest.approx(of(prompt), abs=1e-6)


async def test_limits_on_inputs_tokens_and_numbers(embedder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for param, body in (("input", {"input": [[1]] * 2049}), ("input", {"input": ["a"] * 2049})):
        assert (await embed(embedder, 413, **body))["param"] == param
    monkeypatch.setattr(embeddings, "MAX_NUMBERS", 10)
    assert "at most 2 texts" in (await embed(embedder, 413, input=[[1]] * 3))["message"]
    await embed(embedder, input=[[1]] * 3, dimensions=3)
    monkeypatch.setattr(pooling, "MAX_TOKENS", 5)
    await embed(embedder, 413, input=[[1, 2, 3], [4, 5, 6]], dimensions=1)
    monkeypatch.setattr(pooling, "MAX_CHARACTERS", 5)
    await embed(embedder, 413, input=["abc", "def"], dimensions=1)


@pytest.mark.parametrize("at_once", [3, 40])
async def test_more_inputs_than_there_is_room_for(at_once: int, embedder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three at once, or more than the queue of 8 takes: then those that were refused come later."""
    monkeypatch.setattr(pooling, "MAX_AT_ONCE", at_once)
    prompts = [[i % 250, i % 7, 3] for i in range(40)]
    answer = await embed(embedder, input=prompts)
    for vector, prompt in zip(vectors(answer), prompts, strict=True):
        assert vector == pytest.approx(of(prompt), abs=1e-6)
    await embedder.until(embedder.is_idle)


async def test_wrong_requests_name_their_field(embedder: Any) -> None:
    table: list[tuple[dict[str, Any], str]] = [
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [999]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": 5}, "input"),
        ({}, "input"),
        ({"input": "a", "messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"input": "a", "embed_dtype": "float16"}, "embed_dtype"),
        ({"input": "a", "endianness": "big"}, "endianness"),
        ({"input": "a", "colour": 1}, "colour"),
        ({"input": "a", "priority": "high"}, "priority"),
        ({"input": "a", "timeout": 0}, "timeout"),
        ({"input": "a", "user": 5}, "user"),
    ]
    for body, param in table:
        assert (await embed(embedder, 400, **body))["param"] == param, body
    await embed(embedder, input="")  # the model's own token is one


async def test_routes_of_another_task_say_what_there_is(embedder: Any, server: Any) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}]}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", {"prompt": "x"})):
        response = await embedder.client.post(path, json=body)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_task", "model")
        assert "/v1/embeddings" in error["message"]
    error = await embed(server, 400, input="a")
    assert "--task generate" in error["message"]
    assert (await embed(embedder, 404, input="a", model="other"))["code"] == "model_not_found"


async def counts(server: Any) -> Callable[[str], float]:
    text = (await server.client.get("/metrics")).text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return lambda start: sum(float(number) for name, number in lines.items() if name.startswith(start))


async def test_prompts_are_counted_and_nothing_else(embedder: Any) -> None:
    await embed(embedder, input=[[1, 2, 3], [4, 5]])
    value = await counts(embedder)
    assert value("vllm:prompt_tokens_total{") == 5
    assert value("vllm:generation_tokens_total{") == 0
    assert value("vllm:time_to_first_token_seconds_count{") == 0
    assert value('vllm:request_success_total{finished_reason="stop"') == 2
    assert value("vllm:request_success_total{") == 2
    assert value("vllm:e2e_request_latency_seconds_count{") == 2
    assert value("qwen_ray_sampled_tokens_total{") == 0


async def test_what_is_refused_is_counted_too(embedder: Any) -> None:
    embedder.replicas[0].ranks.seconds = 0.3
    first = asyncio.create_task(embed(embedder, input=[[i] for i in range(8)]))  # all that may wait
    await embedder.until(lambda: embedder.dispatcher.num_sequences == 8)
    second = asyncio.create_task(embed(embedder, input=[[i] for i in range(8)]))
    await embedder.until(lambda: embedder.dispatcher.num_sequences == 16)
    assert (await embed(embedder, 429, input=[[1], [2], [3]]))["code"] == "overloaded"
    value = await counts(embedder)
    assert value('vllm:request_success_total{finished_reason="error"') == 3
    await first
    await second
    value = await counts(embedder)
    assert value('vllm:request_success_total{finished_reason="stop"') == 16


async def test_priority_timeout_and_key_travel_with_each_input(embedder: Any) -> None:
    await embed(embedder, input=["a", "b"], priority=3, timeout=50)
    for request in embedder.replicas[0].requests:
        assert request.priority == 3
        assert 0 < request.deadline - request.arrival <= 50
    embedder.replicas[0].ranks.seconds = 0.5
    response = await embedder.client.post("/v1/embeddings", json={"input": ["a"] * 20, "timeout": 0.6})
    assert response.status_code == 408
    await embedder.until(embedder.is_idle)


async def test_nobody_notices_a_replica_s_death(ending_tokenizer: Tokenizer, start_server: Start) -> None:
    server = await start_server(num_replicas=2, tokenizer=ending_tokenizer, about=EMBEDDER)
    server.replicas[0].deltas_until_death = 3
    prompts = [[i, i % 7, 3] for i in range(30)]
    answer = await embed(server, input=prompts)
    for vector, prompt in zip(vectors(answer), prompts, strict=True):
        assert vector == pytest.approx(of(prompt), abs=1e-6)
    assert server.replicas[0].deltas_until_death is None
    assert "qwen_ray_hand_overs_total" in (await server.client.get("/metrics")).text
    await server.until(server.is_idle)


async def test_a_client_that_leaves_frees_everything(embedder: Any) -> None:
    embedder.replicas[0].ranks.seconds = 0.2
    with pytest.raises(httpx.ReadTimeout):
        await embedder.client.post("/v1/embeddings", json={"input": ["a"] * 50}, timeout=0.4)
    await embedder.until(embedder.is_idle)


async def test_keys_and_the_audit_log_hear_of_prompts(
    ending_tokenizer: Tokenizer, start_server: Start, tmp_path: Path
) -> None:
    path = tmp_path / "audit.jsonl"
    http = HttpSettings(api_keys=(ApiKey.of("right", "team-a").model_copy(update={"tokens_per_minute": 6}),))
    audit = AuditLog(path, 10**6, keeps_contents=True)
    server = await start_server(tokenizer=ending_tokenizer, about=EMBEDDER, http=http, audit=audit)
    server.client.headers["Authorization"] = "Bearer right"
    await embed(server, input=["ab", "c"])
    assert (await embed(server, 429, input="abcdef"))["code"] == "rate_limit_exceeded"
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["outcome"], first["prompt_tokens"], first["completion_tokens"]) == ("stop", 5, 0)
    assert first["request"] == ["ab", "c"]
    assert second["outcome"] == "rate_limit_exceeded"


async def test_prompts_are_logged_only_when_asked_for(embedder: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="qwen_ray")
    await embed(embedder, input="secret")
    assert "secret" not in caplog.text
    embedder.service.generator._log_requests = True
    await embed(embedder, input="secret")
    assert "asks 'secret" in caplog.text
