"""Fields of requests over HTTP, sent and not sent: which make a difference, and which.

What is sampled comes of a random model whose tokens are all about as likely, computed in this process.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_model
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import Qwen2ForCausalLM

from qwen_ray.core.plan import EngineConfig, ParallelPlan, ReplicaSpec
from qwen_ray.source.config_file import load_config
from qwen_ray.text.tokenizer import Tokenizer
from qwen_ray.worker.local import LocalExecutor
from tests.unit.serving.conftest import Server, write_tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
NEEDED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    COMPLETIONS: {"prompt": "Hi"},
}
ENGINE = EngineConfig(num_blocks=200, block_size=4, max_model_len=400)
START, END, A = 256, 257, 32  # tokens; the last one is the letter
NUM_TOKENS = 12
COMMON: dict[str, Any] = {"temperature": 0, "seed": 1, "max_tokens": NUM_TOKENS, "return_token_ids": True}
HOT: dict[str, Any] = {"temperature": 2, "seed": 7}


@dataclass(frozen=True)
class Told:
    """Choices in their order; `body` is the whole answer."""

    texts: list[str]
    token_ids: list[list[int]]
    reasons: list[str]
    body: dict[str, Any]

    @property
    def ids(self) -> list[int]:
        return self.token_ids[0]

    @property
    def text(self) -> str:
        return self.texts[0]

    @property
    def choice(self) -> dict[str, Any]:
        return self.body["choices"][0]


@dataclass(frozen=True)
class Case:
    """A field, by its `name`: `check` gets the answers without it, with it, and the greedy one.

    `without` is what both of the first two requests have.
    """

    name: str
    value: Any
    check: Callable[[Told, Told, Told], bool]
    without: dict[str, Any] = field(default_factory=dict[str, Any])
    paths: tuple[str, ...] = (CHAT, COMPLETIONS)


def always(token: int, bias: float = 100.0) -> dict[str, Any]:
    return {"logit_bias": {str(token): bias}}


def says_the_likeliest(plain: Told, given: Told, greedy: Told) -> bool:
    return plain.ids != greedy.ids == given.ids


def becomes(text: str) -> Callable[[Told, Told, Told], bool]:
    return lambda plain, given, _: plain.text != given.text == text


CASES = (
    Case("temperature", 2, lambda plain, given, greedy: plain.ids == greedy.ids != given.ids),
    Case("seed", 8, lambda plain, given, _: plain.ids != given.ids, HOT),
    Case("top_k", 1, says_the_likeliest, HOT),
    Case("top_p", 1e-6, says_the_likeliest, HOT),
    Case("min_p", 1, says_the_likeliest, HOT),
    Case("repetition_penalty", 1000, lambda _, given, __: given.ids.count(A) == 1, always(A, 1.5)),
    Case("presence_penalty", 2, lambda _, given, __: given.ids.count(A) == 1, always(A, 1.5)),
    Case("frequency_penalty", 0.5, lambda _, given, __: 1 < given.ids.count(A) < 5, always(A, 1.5)),
    Case("logit_bias", {str(A): 100}, becomes("A" * NUM_TOKENS)),
    Case("n", 3, lambda plain, given, _: [*map(len, (plain.texts, given.texts))] == [1, 3], HOT),
    Case("max_tokens", 3, lambda _, given, __: len(given.ids) == 3, always(A)),
    Case("max_completion_tokens", 3, lambda _, given, __: len(given.ids) == 3, always(A), (CHAT,)),
    Case("min_tokens", 5, lambda plain, given, _: (plain.ids, len(given.ids)) == ([END], 6), always(END)),
    Case(
        "ignore_eos",
        True,
        lambda plain, given, _: (plain.reasons, given.reasons) == (["stop"], ["length"]),
        always(END),
    ),
    Case("stop", ["never", "AAA"], becomes(""), always(A)),
    Case("include_stop_str_in_output", True, becomes("AAA"), {**always(A), "stop": "AAA"}),
    Case("stop_token_ids", [A], lambda _, given, __: given.choice["stop_reason"] == A, always(A)),
    Case("skip_special_tokens", False, becomes("<|im_start|>" * NUM_TOKENS), always(START)),
    Case("return_token_ids", False, lambda plain, given, _: (len(plain.ids), given.ids) == (NUM_TOKENS, []), always(A)),
    Case(
        "logprobs",
        True,
        lambda plain, given, _: len(given.choice["logprobs"]["content"]) == NUM_TOKENS,
        always(A),
        (CHAT,),
    ),
    Case(
        "top_logprobs",
        3,
        lambda _, given, __: len(given.choice["logprobs"]["content"][0]["top_logprobs"]) == 3,
        {"logprobs": True},
        (CHAT,),
    ),
    Case("logprobs", 2, lambda _, given, __: len(given.choice["logprobs"]["top_logprobs"][0]) >= 2, {}, (COMPLETIONS,)),
    Case("prompt_logprobs", 1, lambda _, given, __: len(of_prompt(given)) > 1),
    Case("echo", True, lambda plain, given, _: given.text == "Hi" + plain.text, always(A), (COMPLETIONS,)),
)


def of_prompt(told: Told) -> list[Any]:
    return told.body.get("prompt_logprobs") or told.choice["prompt_logprobs"]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_model(tmp_path_factory.mktemp("flat"))
    model = Qwen2ForCausalLM.from_pretrained(path)
    for parameter in model.parameters():
        parameter.data *= 0.3
    model.save_pretrained(path)
    return path


@pytest.fixture
async def flat(model_path: Path) -> AsyncIterator[Server]:
    config = load_config(model_path)
    spec = ReplicaSpec(
        name="tiny", path=str(model_path), config=config, plan=ParallelPlan.of(config), engine=ENGINE, dtype="float32"
    )
    executor = LocalExecutor(spec)
    server = Server(Tokenizer.load(model_path), ENGINE, executor=executor)
    yield await server.start(num_replicas=1)
    await server.stop()
    executor.close()


async def ask(server: Server, path: str, **body: Any) -> Told:
    response = await server.client.post(path, json={**NEEDED[path], **COMMON, **body})
    assert response.status_code == 200, response.text
    answer = response.json()
    choices = answer["choices"]
    return Told(
        texts=[choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices],
        token_ids=[choice.get("token_ids", []) for choice in choices],
        reasons=[choice["finish_reason"] for choice in choices],
        body=answer,
    )


async def stream(server: Server, path: str, **body: Any) -> list[dict[str, Any]]:
    """All but the last event, which says that it is over."""
    whole = {**NEEDED[path], **COMMON, **body, "stream": True}
    async with server.client.stream("POST", path, json=whole) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def joined(chunks: list[dict[str, Any]], told: Told) -> Told:
    """What the chunks come to, in the shape of `told`."""
    count = len(told.texts)
    texts, token_ids, reasons = [""] * count, [list[int]() for _ in range(count)], [""] * count
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        index = choice["index"]
        texts[index] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        token_ids[index] += choice.get("token_ids", [])
        reasons[index] = choice["finish_reason"] or reasons[index]
    return Told(texts=texts, token_ids=token_ids, reasons=reasons, body=told.body)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_field_is_seen_in_the_answer_and_in_the_stream(flat: Server, path: str) -> None:
    greedy = await ask(flat, path)
    for case in CASES:
        if path in case.paths:
            given = {**case.without, case.name: case.value}
            plain, told = await ask(flat, path, **case.without), await ask(flat, path, **given)
            assert case.check(plain, told, greedy), (case, plain, told, greedy)
            assert joined(await stream(flat, path, **given), told) == told, case


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_usage_comes_with_the_stream_where_it_is_asked_for(server: Any, path: str) -> None:
    whole = await ask(server, path)
    for options, usages in ((None, []), ({"include_usage": True}, [whole.body["usage"]["completion_tokens"]])):
        chunks = await stream(server, path, stream_options=options)
        told = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")]
        assert told == usages


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_whose_turn_it_is(tokenizer: Any, path: str) -> None:
    config = EngineConfig(num_blocks=200, block_size=4, max_model_len=400, max_num_waiting=8, max_num_seqs=1)
    server = await Server(tokenizer, config).start(num_replicas=1)
    try:
        server.replicas[0].ranks.seconds = 0.02
        ended: list[str] = []

        async def take_turn(name: str, **body: Any) -> None:
            await ask(server, path, **body)
            ended.append(name)

        turns: list[asyncio.Task[None]] = []
        for name, body in (("first", {}), ("late", {"priority": 5}), ("soon", {"priority": -5})):
            turns.append(asyncio.create_task(take_turn(name, **body)))
            await server.until(lambda: len(server.replicas[0].requests) == len(turns))
        await asyncio.gather(*turns)
        assert ended == ["first", "soon", "late"]
    finally:
        await server.stop()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_the_time_that_a_request_gives_itself(server: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_ray.serving.call.GRACE_SECONDS", 0.0)
    server.replicas[0].ranks.seconds = 1.0
    response = await server.client.post(path, json={**NEEDED[path], "timeout": 0.05})
    assert (response.status_code, response.json()["error"]["code"]) == (408, "deadline_exceeded")
    await server.until(server.is_idle)


async def test_special_tokens_of_the_tokenizer_s_own(tokenizer_path: Path, tmp_path: Path, start_server: Any) -> None:
    """It puts one before each text."""
    backend = Backend.from_file(str(tokenizer_path / "tokenizer.json"))
    name = "<|im_start|>"
    backend.post_processor = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, START)])
    backend.save(str(tmp_path / "tokenizer.json"))
    server = await start_server(tokenizer=Tokenizer.load(tmp_path))
    plain = server.tokenizer.encode("ab", False)
    for options, expected in (({}, [START, *plain]), ({"add_special_tokens": False}, plain)):
        await ask(server, COMPLETIONS, prompt="ab", **options)
        assert list(server.replicas[0].requests[-1].prompt_token_ids) == expected
        answer = await server.client.post("/tokenize", json={"prompt": "ab", **options})
        assert answer.json()["tokens"] == expected


async def test_names_and_ids_of_messages_reach_the_template(tmp_path: Path, start_server: Any) -> None:
    template = "{% for m in messages %}{{ m.role }}({{ m.name }},{{ m.tool_call_id }}){% endfor %}"
    server = await start_server(tokenizer=Tokenizer.load(write_tokenizer(tmp_path, template)))
    messages = [
        {"role": "user", "content": "x", "name": "Ada"},
        {"role": "tool", "content": "x", "tool_call_id": "call_1"},
    ]
    tokens = (await server.client.post("/tokenize", json={"messages": messages})).json()["tokens"]
    assert server.tokenizer.decode(tokens) == "user(Ada,)tool(,call_1)"


async def test_fields_of_messages_that_no_template_knows_are_checked(server: Any) -> None:
    said = {"role": "assistant", "content": "x"}
    for name, right, wrong in (
        ("refusal", None, 5),
        ("annotations", [], {}),
        ("audio", None, {"id": "x"}),
        ("function_call", None, {"name": "f", "arguments": "{}"}),
    ):
        for value, status in ((right, 200), (wrong, 400)):
            messages = [*NEEDED[CHAT]["messages"], {**said, name: value}]
            response = await server.client.post(CHAT, json={"messages": messages, "max_tokens": 1})
            assert response.status_code == status, (name, value, response.text)


async def test_what_scores_have_in_common(tokenizer_path: Path, tmp_path: Path, start_server: Any) -> None:
    backend = Backend.from_file(str(tokenizer_path / "tokenizer.json"))
    backend.add_tokens(["yes", "no"])
    backend.save(str(tmp_path / "tokenizer.json"))
    server = await start_server(tokenizer=Tokenizer.load(tmp_path))
    long = "abcdefghij" * 100

    async def score(path: str, status: int = 200, **body: Any) -> tuple[Any, Any]:
        sides = {"query": "q", "documents": [long]} if path == "/v1/rerank" else {"text_1": "q", "text_2": [long]}
        response = await server.client.post(path, json={**sides, **body})
        assert response.status_code == status, response.text
        answer = response.json()
        found = answer.get("results") or answer.get("data") or [None]
        return server.replicas[0].requests[-1] if status == 200 else answer["error"], found[0]

    for path in ("/v1/score", "/v1/rerank"):
        assert (await score(path, 400))[0]["code"] == "context_length_exceeded"
        whole, _ = await score(path, truncate_prompt_tokens=-1)
        assert len(whole.prompt_token_ids) == 400
        cut, plain = await score(path, truncate_prompt_tokens=350)
        other_side, _ = await score(path, truncate_prompt_tokens=350, truncation_side="left")
        assert len(cut.prompt_token_ids) == len(other_side.prompt_token_ids) == 350
        assert cut.prompt_token_ids != other_side.prompt_token_ids
        asked, raw = await score(
            path, truncate_prompt_tokens=350, use_activation=False, priority=3, timeout=50, user="u"
        )
        assert plain != raw
        assert asked.priority == 3
        assert 0 < asked.deadline - asked.arrival <= 50
        assert (await score(path, 400, truncate_prompt_tokens=350, user=5))[0]["param"] == "user"
