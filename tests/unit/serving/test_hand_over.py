"""Whatever happens to replicas, whoever reads a stream sees what it would have seen in peace: property-based."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field, replace
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.request import GenerateRequest, Grammar, SamplingParams, TokenLogprobs
from qwen_ray.grammar.matcher import GrammarCompiler
from qwen_ray.serving import links
from qwen_ray.serving.dispatch import Dispatcher
from qwen_ray.text.choice import Choice
from qwen_ray.text.tokenizer import Tokenizer
from qwen_ray.text.tool_calls import ToolUse
from tests.unit.serving.mortal_replicas import Blow, Population

VOCAB_SIZE = 260
EOS = 257
LIKELY = [*range(64, 76), *range(220, 230)]  # letters, and parts of others
CONFIG = EngineConfig(num_blocks=128, block_size=4, max_model_len=240, max_num_seqs=8)
PROMPT = tuple(range(65, 85))

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{0,4}$"}, "maxItems": 3}},
    "required": ["a"],
    "additionalProperties": False,
}
GRAMMAR = Grammar(kind="json_schema", text=json.dumps(SCHEMA))
SHORT = {1: 6.0, 60: 6.0, 92: 6.0, 197: -99.0, 198: -99.0, 201: -99.0, 220: -99.0}  # quotes, brackets; white space
KINDS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=24),
    "seeded": SamplingParams(temperature=1.0, top_p=0.9, max_tokens=24),
    "n": SamplingParams(temperature=1.3, n=3, max_tokens=16, logit_bias={EOS: 3.0}),
    "logprobs": SamplingParams(temperature=0.7, logprobs=3, max_tokens=12),
    "prompt logprobs": SamplingParams(temperature=0.0, logprobs=0, prompt_logprobs=2, max_tokens=8),
    "stop strings": SamplingParams(
        temperature=0.8, stop=("d", "fe", "gg"), max_tokens=24, include_stop_str_in_output=True
    ),
    "stop ids": SamplingParams(temperature=0.8, stop_token_ids=(66, 67), max_tokens=24),
    "penalties": SamplingParams(
        temperature=0.9, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.4, max_tokens=24
    ),
    "min tokens": SamplingParams(temperature=0.6, min_tokens=10, max_tokens=12, logit_bias={EOS: 7.0, 70: -3.0}),
    "thinking": SamplingParams(temperature=0.8, thinking_budget=5, max_tokens=170),
    "one token": SamplingParams(temperature=0.0, max_tokens=1),
    "grammar": SamplingParams(temperature=0.9, max_tokens=60, grammar=GRAMMAR, logit_bias=SHORT),
    "grammar and min tokens": SamplingParams(
        temperature=0.9, max_tokens=60, min_tokens=50, grammar=GRAMMAR, logit_bias=SHORT
    ),
    "grammar after thinking": SamplingParams(
        temperature=0.9,
        thinking_budget=5,
        max_tokens=200,
        grammar=replace(GRAMMAR, after_thinking=True),
        logit_bias=SHORT,
    ),
    "tools": SamplingParams(temperature=0.9, max_tokens=200),
    "one call": SamplingParams(temperature=0.9, max_tokens=200),
}
TOOL_PROMPT = (VOCAB_SIZE - 1, *PROMPT)
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call> \\" é"}}\n</tool_call>\n'


@dataclass
class Told:
    """Of one choice."""

    text: str = ""
    reasoning: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: list[tuple[TokenLogprobs, ...]] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    ends: list[tuple[str, Any]] = field(default_factory=list)
    num_tokens: int = 0
    num_reasoning_tokens: int = 0


def choices_of(kind: str, tokenizer: Tokenizer) -> list[Choice]:
    asked = KINDS[kind]
    alone = replace(asked, stop=())
    request = GenerateRequest(
        request_id=kind,
        prompt_token_ids=PROMPT,
        sampling=tokenizer.with_thinking(alone, PROMPT),
        seed=7,
        stop_token_ids=(*asked.stop_token_ids, EOS),
    )
    thinks = "thinking" in kind
    if thinks:  # the prompt ends within a block
        start = next(iter(tokenizer.encode("<think>")))
        request = replace(request, prompt_token_ids=(*PROMPT, start))
        request = replace(request, sampling=tokenizer.with_thinking(alone, request.prompt_token_ids))
    tools = None
    if kind in ("tools", "one call"):
        request = replace(request, prompt_token_ids=TOOL_PROMPT)
        tools = ToolUse(syntax="hermes", is_parallel=kind == "tools")
    return [
        Choice(i, single, asked.stop, tokenizer, splits_thinking=thinks, tools=tools)
        for i, single in enumerate(request.choices())
    ]


async def read(dispatcher: Dispatcher, choices: list[Choice]) -> list[Told]:
    by_id = {choice.request.request_id: choice for choice in choices}
    told = [Told() for _ in choices]
    with dispatcher.open([choice.request for choice in choices]) as stream:
        while stream.is_open:
            for request_id, delta in await stream.take():
                choice = by_id[request_id]
                if choice.finish_reason is not None:
                    continue
                piece, seen = choice.push(delta), told[choice.index]
                seen.text += piece.text
                seen.reasoning += piece.reasoning
                for call in piece.calls:
                    if call.name is not None:
                        seen.calls.append((call.name, ""))
                    seen.calls[-1] = (seen.calls[-1][0], seen.calls[-1][1] + call.arguments)
                seen.token_ids += piece.token_ids
                seen.logprobs += piece.logprobs
                seen.prompt_logprobs += [piece.prompt_logprobs] * bool(piece.prompt_logprobs)
                if choice.finish_reason is not None:
                    seen.ends.append((piece.finish_reason or "", piece.stop_reason))
                    stream.drop(request_id)
    for choice, seen in zip(choices, told, strict=True):
        seen.num_tokens, seen.num_reasoning_tokens = choice.num_tokens, choice.num_reasoning_tokens
        assert choice.num_cached_tokens <= len(choice.request.prompt_token_ids)
    return told


async def serve(kinds: list[str], size: int, blows: list[Blow], tokenizer: Tokenizer) -> dict[str, list[Told]]:
    recital = [*tokenizer.encode("I see.\n" + CALL + CALL), EOS]
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE)
    population = Population(size, blows, CONFIG, VOCAB_SIZE, LIKELY, {TOOL_PROMPT: recital}, compiler)
    dispatcher = Dispatcher(population.find, population.connect)
    await dispatcher.start()
    try:
        async with asyncio.timeout(30):
            told = await asyncio.gather(*(read(dispatcher, choices_of(kind, tokenizer)) for kind in kinds))
            assert dispatcher.num_sequences == 0
            while any(replica.holds_something for replica in population.replicas):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    finally:
        await dispatcher.close()
        await population.stop()
    return dict(zip(kinds, told, strict=True))


@pytest.fixture(scope="module")
def in_peace(thinking_tokenizer: Tokenizer) -> dict[str, list[Told]]:
    return asyncio.run(serve(list(KINDS), 1, [], thinking_tokenizer))


def test_the_kinds_are_different_from_each_other(in_peace: dict[str, list[Told]]) -> None:
    reasons = {end for told in in_peace.values() for one in told for end in one.ends}
    assert {("stop", None), ("length", None)} < reasons
    assert any(isinstance(reason, str) for _, reason in reasons)
    assert any(isinstance(reason, int) for _, reason in reasons)
    assert in_peace["thinking"][0].num_reasoning_tokens > 5
    assert [(one.text, len(one.calls), one.ends) for kind in ("tools", "one call") for one in in_peace[kind]] == [
        ("I see.", 2, [("tool_calls", None)]),
        ("I see.", 1, [("tool_calls", None)]),
    ]
    for kind in KINDS:
        if kind.startswith("grammar"):
            (told,) = in_peace[kind]
            jsonschema.validate(json.loads(told.text), SCHEMA)
    assert in_peace["grammar after thinking"][0].num_reasoning_tokens > 5
    assert in_peace["grammar and min tokens"][0].num_tokens < 50  # there was nothing more to say
    assert set(in_peace["tools"][0].calls) == {("f", '{"a": "</tool_call> \\" é"}')}
    assert len({one.text for one in in_peace["n"]}) == 3
    assert len(in_peace["prompt logprobs"][0].prompt_logprobs[0]) == len(PROMPT) - 1
    assert all(len(one.ends) == 1 for told in in_peace.values() for one in told)


blows = st.builds(
    Blow,
    fate=st.sampled_from(["dies", "drains", "hangs"]),
    num_deltas=st.integers(1, 60),
    num_lost=st.integers(0, 3),
)


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=5, unique=True),
    size=st.integers(1, 3),
    blows=st.lists(blows, min_size=1, max_size=5),
)
def test_nobody_notices(
    kinds: list[str], size: int, blows: list[Blow], in_peace: dict[str, list[Told]], thinking_tokenizer: Tokenizer
) -> None:
    # Three deaths without progress in between would be taken for the request's own doing.
    deaths = [i for i, blow in enumerate(blows) if blow.fate == "dies"]
    blows = [blow for i, blow in enumerate(blows) if i not in deaths[2:]]
    told = asyncio.run(serve(kinds, size, blows, thinking_tokenizer))
    for kind in kinds:
        assert told[kind] == in_peace[kind]


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setattr(links, "LOOK_SECONDS", 0.01)
    patch.setattr(links, "TICK_SECONDS", 0.005)
    yield
    patch.undo()
