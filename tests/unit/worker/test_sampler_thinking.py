"""Thinking budgets: where an ending is said, and that a sequence which comes back goes on at the same place of it."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.core.request import GenerateRequest, SamplingParams, Thinking
from qwen_ray.core.step import Sample
from qwen_ray.worker.sampler import sample
from qwen_ray.worker.sequences import SequenceState

VOCAB = 12
START, END, STOP = 10, 11, 9
ENDING = (7, 8, END, 6)
THINKING = Thinking(start_id=START, end_id=END, ending=ENDING)
PROMPT = (1, 2, 3)


def state(output: list[int], **params: Any) -> SequenceState:
    """As a rank knows a sequence that has just come with `output`."""
    return SequenceState(
        sequence_id=0,
        token_ids=array("q", [*PROMPT, *output]),
        num_prompt_tokens=len(PROMPT),
        sampling=SamplingParams(**{"thinking": THINKING, "temperature": 0.0, **params}),
        seed=5,
        stop_token_ids=(STOP,),
        blocks=array("q"),
    )


def step(sequence: SequenceState, says: int | None = None) -> Sample:
    """`says` is what the model wants; without, its logits are random and depend on the position only."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(sequence.num_tokens))
    if says is not None:
        logits[0, says] += 20
    (result,) = sample(logits, [sequence])
    return result


def say(text: list[int], budget: int | None, num_tokens: int, **params: Any) -> list[int]:
    """What comes of a model that wants to say `text`, a forced token taking nothing of it away."""
    sequence = state([], thinking_budget=budget, **params)
    wanted = iter(text)
    for _ in range(num_tokens):
        is_forced = sequence.forced_token is not None
        sequence.token_ids.append(step(sequence, None if is_forced else next(wanted)).token_id)
    return sequence.token_ids[len(PROMPT) :].tolist()


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0, [4, START, *ENDING, 5, 5, 5, 5, END]),
        (1, [4, START, 5, *ENDING, 5, 5, 5, END]),
        (3, [4, START, 5, 5, 5, *ENDING, 5, END]),
        (4, [4, START, 5, 5, 5, 5, *ENDING, END]),
        (5, [4, START, 5, 5, 5, 5, END]),
        (None, [4, START, 5, 5, 5, 5, END]),
    ],
)
def test_a_block_ends_with_its_budget(budget: int | None, expected: list[int]) -> None:
    text = [4, START, 5, 5, 5, 5, END]
    assert say(text, budget, len(expected)) == expected


def test_a_block_that_the_prompt_has_opened() -> None:
    opened = replace(THINKING, starts_open=True)
    assert say([4, 4], 0, 6, thinking=opened) == [*ENDING, 4, 4]
    assert say([4, 5, 5], 1, 7, thinking=opened) == [4, *ENDING, 5, 5]
    assert say([4, END, 5, 5], 2, 4, thinking=opened) == [4, END, 5, 5]


def test_the_budget_is_that_of_all_blocks() -> None:
    text = [START, 5, 5, END, 4, START, 5, 4, START, 4]
    assert say(text, 3, 18) == [START, 5, 5, END, 4, START, 5, *ENDING, 4, START, *ENDING, 4]


@settings(max_examples=25, deadline=None)
@given(
    budget=st.integers(0, 6),
    starts_open=st.booleans(),
    cut=st.integers(0, 29),
    temperature=st.sampled_from([0.0, 1.0]),
    penalty=st.sampled_from([1.0, 1.5]),
)
def test_a_resumed_sequence_goes_on_as_if_nothing_had_happened(
    budget: int, starts_open: bool, cut: int, temperature: float, penalty: float
) -> None:
    params = {
        "thinking_budget": budget,
        "thinking": replace(THINKING, starts_open=starts_open),
        "temperature": temperature,
        "repetition_penalty": penalty,
        "logprobs": 2,
    }
    whole = state([], **params)
    samples = []
    for _ in range(30):
        samples.append(step(whole))
        whole.token_ids.append(samples[-1].token_id)
    resumed = state([one.token_id for one in samples[:cut]], **params)
    for expected in samples[cut:]:
        assert step(resumed) == expected
        resumed.token_ids.append(expected.token_id)


def test_a_forced_token_has_the_models_own_logprob_and_no_say_in_it() -> None:
    forbidden = {"logit_bias": {ENDING[0]: -100.0}, "min_tokens": 50, "top_k": 1, "temperature": 1.0}
    sequence = state([START], thinking_budget=0, logprobs=1, **forbidden)
    result = step(sequence, says=4)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(sequence.num_tokens))
    logits[0, 4] += 20
    assert result.token_id == ENDING[0]
    assert result.logprobs is not None
    assert result.logprobs.logprob == pytest.approx(logits.log_softmax(-1)[0, ENDING[0]].item(), abs=1e-5)
    assert result.logprobs.top[0][0] == 4


def test_only_the_rows_with_a_spent_budget_are_forced() -> None:
    rows = [state([START], thinking_budget=0), state([START]), state([4], thinking_budget=0), state([START, 5])]
    logits = torch.zeros(4, VOCAB)
    logits[:, 3] = 1.0
    assert [one.token_id for one in sample(logits, rows)] == [ENDING[0], 3, 3, 3]


def test_logits_that_are_not_finite_are_still_an_error() -> None:
    (result,) = sample(torch.full((1, VOCAB), float("nan")), [state([START], thinking_budget=0)])
    assert result.error is not None


def test_every_choice_has_the_whole_budget() -> None:
    sampling = SamplingParams(n=3, thinking=THINKING, thinking_budget=2)
    request = GenerateRequest(request_id="r", prompt_token_ids=PROMPT, sampling=sampling, seed=1)
    assert {(one.sampling.thinking, one.sampling.thinking_budget) for one in request.choices()} == {(THINKING, 2)}
