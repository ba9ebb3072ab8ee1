"""Rows with a grammar among rows without; where thinking, min_tokens and ignore_eos leave it; and coming back to it."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.core.request import Grammar, SamplingParams, Thinking
from qwen_ray.core.step import Sample
from qwen_ray.grammar.matcher import GrammarCompiler
from qwen_ray.text.byte_vocabulary import byte_vocabulary
from qwen_ray.text.tokenizer import _BYTE_OF, Tokenizer
from qwen_ray.worker.grammars import GrammarMasks
from qwen_ray.worker.sampler import sample
from qwen_ray.worker.sequences import SequenceState

TOKENIZER = Tokenizer(byte_vocabulary(_BYTE_OF))  # token i is byte i
EOS, START, END, OTHER_STOP, VOCAB = 256, 257, 258, 259, 264
ENDING = (*b"\nwell\n", END, *b"\n\n")
THINKING = Thinking(start_id=START, end_id=END, ending=ENDING)
PROMPT = (1, 2, 3)
DIGITS = Grammar(kind="regex", text="[0-9]{2,5}")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
}
JSON = Grammar(kind="json_schema", text=json.dumps(SCHEMA))


@pytest.fixture(scope="module")
def masks() -> GrammarMasks:
    compiler = GrammarCompiler(TOKENIZER, VOCAB)
    return GrammarMasks(lambda: compiler)


def state(
    output: list[int] | None = None, *, stops: tuple[int, ...] = (EOS,), seed: int = 5, **params: Any
) -> SequenceState:
    return SequenceState(
        sequence_id=seed,
        token_ids=array("q", [*PROMPT, *(output or [])]),
        num_prompt_tokens=len(PROMPT),
        sampling=SamplingParams(**{"temperature": 0.0, **params}),
        seed=seed,
        stop_token_ids=stops,
        blocks=array("q"),
    )


def logits_of(sequence: SequenceState, wants: int | None = None) -> torch.Tensor:
    """[1, VOCAB], random, of the sequence's own place alone; `wants` is by far the likeliest."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(sequence.num_tokens * 7 + sequence.seed))
    if wants is not None:
        logits[0, wants] += 50
    return logits


def step(masks: GrammarMasks, sequence: SequenceState, wants: int | None = None) -> Sample:
    (result,) = sample(logits_of(sequence, wants), [sequence], masks.start([sequence]).result())
    return result


def allowed(masks: GrammarMasks, sequence: SequenceState) -> set[int]:
    logits = torch.zeros(1, VOCAB)
    masks.start([sequence]).result().apply(logits)
    return set(logits[0].isfinite().nonzero()[:, 0].tolist())


def say(
    masks: GrammarMasks, sequence: SequenceState, num_tokens: int, wants: Callable[[int], int | None] = lambda n: None
) -> list[int]:
    for number in range(num_tokens):
        result = step(masks, sequence, wants(number))
        assert result.error is None
        sequence.token_ids.append(result.token_id)
        if result.token_id in sequence.stop_token_ids:
            break
    return sequence.token_ids[len(PROMPT) :].tolist()


def test_the_mask_is_the_grammar(masks: GrammarMasks) -> None:
    digits = set(b"0123456789")
    assert allowed(masks, state(grammar=DIGITS)) == digits
    assert allowed(masks, state([*b"1"], grammar=DIGITS)) == digits
    assert allowed(masks, state([*b"12"], grammar=DIGITS)) == digits | {EOS}
    assert allowed(masks, state([*b"12345"], grammar=DIGITS)) == {EOS}


def test_rows_without_a_grammar_are_left_alone(masks: GrammarMasks) -> None:
    kinds = [
        {"grammar": DIGITS},
        {},
        {"grammar": JSON, "temperature": 1.0},
        {"temperature": 1.0},
        {"top_k": 3, "grammar": DIGITS},
    ]
    rows = [state(seed=i + 5, **kind) for i, kind in enumerate(kinds)]
    together = sample(torch.cat([logits_of(row) for row in rows]), rows, masks.start(rows).result())
    assert together == [step(masks, row) for row in rows]
    free = [sample(logits_of(row), [row])[0] for row in rows]
    assert [one == other for one, other in zip(together, free, strict=True)] == [False, True, False, True, False]
    assert together[2].token_id == ord("{")


def test_nobody_has_a_grammar(masks: GrammarMasks) -> None:
    made = masks.start([state(), state()]).result()
    logits = torch.zeros(2, VOCAB)
    made.apply(logits)
    assert logits.eq(0).all()


@pytest.mark.parametrize(
    ("output", "params", "expected"),
    [
        ("12", {"min_tokens": 3}, "digits"),
        ("12", {"min_tokens": 2}, "digits or end"),
        ("12345", {"min_tokens": 20}, "end"),  # nothing else is left
        ("12", {"ignore_eos": True}, "digits"),
        ("12345", {"ignore_eos": True}, "end"),
        ("1", {"stop_token_ids": (ord("7"),)}, "digits"),  # a stop token ends it wherever the grammar has it too
        ("1", {"stop_token_ids": (ord("7"),), "min_tokens": 9}, "digits but 7"),
        ("12", {"stop_token_ids": (OTHER_STOP,)}, "digits or end or stop"),
    ],
)
def test_where_a_text_may_end(masks: GrammarMasks, output: str, params: dict[str, Any], expected: str) -> None:
    digits = set(b"0123456789")
    sets = {
        "digits": digits,
        "digits or end": digits | {EOS},
        "end": {EOS},
        "digits but 7": digits - {ord("7")},
        "digits or end or stop": digits | {EOS, OTHER_STOP},
    }
    stops = (*params.get("stop_token_ids", ()), EOS)
    assert allowed(masks, state([*output.encode()], stops=stops, grammar=DIGITS, **params)) == sets[expected]


def test_there_is_no_token_to_end_with(masks: GrammarMasks) -> None:
    result = step(masks, state([*b"12345"], stops=(), grammar=DIGITS))
    assert result.error is not None
    assert "no token to end it with" in result.error


def test_thinking_comes_first_and_is_free(masks: GrammarMasks) -> None:
    after = Grammar(kind="regex", text="[0-9]{2}", after_thinking=True)
    sequence = state(grammar=after, thinking=THINKING)
    assert allowed(masks, sequence) == {*b"0123456789", START}
    text = [START, *b"hm {", END]
    said = say(masks, sequence, 9, lambda n: text[n] if n < len(text) else None)
    assert said[: len(text)] == text
    assert bytes(said[len(text) : -1]).decode().isdecimal()
    assert said[-1] == EOS


def test_an_answer_does_not_end_within_its_thinking(masks: GrammarMasks) -> None:
    after = Grammar(kind="regex", text="[0-9]{2}", after_thinking=True)
    stops = {"stops": (OTHER_STOP, EOS), "stop_token_ids": (OTHER_STOP,)}
    thinking = state([START, *b"hm"], grammar=after, thinking=THINKING, **stops)
    assert allowed(masks, thinking) == set(range(VOCAB)) - {EOS}
    short = state([START, *b"hm"], grammar=after, thinking=THINKING, min_tokens=20, **stops)
    assert allowed(masks, short) == set(range(VOCAB)) - {EOS, OTHER_STOP}


def test_a_block_that_the_prompt_has_opened_or_that_nobody_asked_for(masks: GrammarMasks) -> None:
    opened = Thinking(start_id=START, end_id=END, ending=ENDING, starts_open=True)
    after = Grammar(kind="regex", text="[0-9]{2}", after_thinking=True)
    assert START in allowed(masks, state(grammar=after, thinking=opened))
    assert allowed(masks, state([*b"x", END], grammar=after, thinking=opened)) == set(b"0123456789")
    assert allowed(masks, state([*b"1"], grammar=after, thinking=THINKING)) == set(b"0123456789")
    assert allowed(masks, state(grammar=DIGITS, thinking=opened)) == set(b"0123456789")
    assert allowed(masks, state(grammar=after)) == set(b"0123456789")


@pytest.mark.parametrize("budget", [0, 3])
def test_a_spent_budget_says_its_ending_and_then_the_grammar_begins(masks: GrammarMasks, budget: int) -> None:
    after = Grammar(kind="regex", text="[0-9]{2}", after_thinking=True)
    sequence = state(grammar=after, thinking=THINKING, thinking_budget=budget)
    said = say(masks, sequence, 40, lambda n: START if n == 0 else ord("x") if n <= budget else None)
    assert said[: 1 + budget] == [START, *b"x" * budget]
    assert said[1 + budget :][: len(ENDING)] == [*ENDING]
    assert bytes(said[1 + budget + len(ENDING) : -1]).decode().isdecimal()


@settings(max_examples=25, deadline=None)
@given(
    cut=st.integers(0, 40),
    temperature=st.sampled_from([0.0, 1.0]),
    budget=st.sampled_from([None, 0, 4]),
    grammar=st.sampled_from([JSON, DIGITS]),
    thinks=st.booleans(),
    min_tokens=st.integers(0, 12),
)
def test_a_resumed_sequence_goes_on_as_if_nothing_had_happened(
    masks: GrammarMasks,
    cut: int,
    temperature: float,
    budget: int | None,
    grammar: Grammar,
    thinks: bool,
    min_tokens: int,
) -> None:
    grammar = Grammar(kind=grammar.kind, text=grammar.text, after_thinking=thinks)
    params = {
        "grammar": grammar,
        "thinking": THINKING,
        "temperature": temperature,
        "min_tokens": min_tokens,
        "logprobs": 1,
        "logit_bias": {START: 4.0, END: 4.0, ord("}"): 3.0},
        **({} if budget is None else {"thinking_budget": budget}),
    }
    whole = state(**params)
    samples: list[Sample] = []
    while len(samples) < 40 and EOS not in whole.token_ids:
        samples.append(step(masks, whole))
        whole.token_ids.append(samples[-1].token_id)
    resumed = state([one.token_id for one in samples[:cut]], **params)
    for expected in samples[cut:]:
        assert step(masks, resumed) == expected
        resumed.token_ids.append(expected.token_id)


def test_only_the_sequence_at_fault_ends_with_an_error(masks: GrammarMasks) -> None:
    rows = [
        state([*b"x"], grammar=DIGITS),  # a token that its grammar did not allow
        state(grammar=Grammar(kind="regex", text="((")),
        state(grammar=DIGITS),
        state(),
    ]
    results = sample(torch.cat([logits_of(row) for row in rows]), rows, masks.start(rows).result())
    assert [result.error is None for result in results] == [False, False, True, True]
    assert "unclosed group" in (results[1].error or "")


def test_a_checkpoint_without_a_tokenizer() -> None:
    rows = [state(grammar=DIGITS), state()]
    results = sample(torch.zeros(2, VOCAB), rows, GrammarMasks(lambda: None).start(rows).result())
    assert "no tokenizer" in (results[0].error or "")
    assert results[1].error is None
