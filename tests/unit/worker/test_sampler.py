"""Sampling against slow, obvious references; and that no row knows of its neighbours."""

from __future__ import annotations

import math
from array import array
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.core.request import SamplingParams
from qwen_ray.worker import sampler
from qwen_ray.worker.prepare import PromptRows
from qwen_ray.worker.sampler import describe_prompts, draw, sample
from qwen_ray.worker.sequences import SequenceState

VOCAB = 50


def sequence(
    prompt: tuple[int, ...] = (1, 2, 3),
    output: tuple[int, ...] = (),
    *,
    seed: int = 0,
    stops: tuple[int, ...] = (),
    sequence_id: int = 0,
    **params: Any,
) -> SequenceState:
    return SequenceState(
        sequence_id=sequence_id,
        token_ids=array("q", prompt + output),
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(**params),
        seed=seed,
        stop_token_ids=stops,
        blocks=array("q"),
    )


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def slow_logits(logits: torch.Tensor, state: SequenceState) -> list[float]:
    """Bias, penalties, min_tokens for one row, token by token."""
    params, values = state.sampling, logits.tolist()
    prompt = list(state.token_ids[: state.num_prompt_tokens])
    output = list(state.token_ids[state.num_prompt_tokens :])
    for token in range(len(values)):
        value = values[token] + params.logit_bias.get(token, 0.0)
        if token in prompt or token in output:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * output.count(token)
        value -= params.presence_penalty * (token in output)
        if len(output) < params.min_tokens and token in state.stop_token_ids:
            value = -math.inf
        values[token] = value
    return values


def slow_probabilities(values: list[float], params: SamplingParams) -> list[float]:
    """Temperature, top_k, top_p, min_p for one row, token by token."""
    best = max(values)
    weights = {token: math.exp((value - best) / params.temperature) for token, value in enumerate(values)}
    order = sorted(weights, key=lambda token: (-weights[token], token))
    if params.top_k > 0:
        order = order[: params.top_k]
    total, mass, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if mass < params.top_p * total:
            kept.append(token)
        mass += weights[token]
    kept = [token for token in kept if weights[token] >= params.min_p * weights[order[0]]]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(values))]


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=20).map(tuple)
params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_k": st.sampled_from([0, -1, 1, 2, 7, 1000]),
        "top_p": st.sampled_from([1.0, 0.9, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 0.5, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.25, -0.5]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -2.0, 4.0]), max_size=3),
        "min_tokens": st.sampled_from([0, 3, 30]),
        "logprobs": st.sampled_from([None, 0, 3]),
    }
)
states = st.builds(
    lambda prompt, output, seed, stops, options: sequence((7, *prompt), output, seed=seed, stops=stops, **options),
    *(tokens, tokens, st.integers(0, 2**63 - 1), tokens.map(lambda t: t[:3]), params),
)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(states, min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_any_batch_against_the_slow_reference(rows: list[SequenceState], seed: int) -> None:
    logits = random_logits(len(rows), seed=seed)
    for i, (state, result) in enumerate(zip(rows, sample(logits.clone(), rows), strict=True)):
        values = slow_logits(logits[i], state)
        if state.sampling.is_greedy:
            assert values[result.token_id] == pytest.approx(max(values), abs=1e-4)
        else:
            assert slow_probabilities(values, state.sampling)[result.token_id] > 0
        raw = logits[i].log_softmax(-1)
        if state.sampling.logprobs is None:
            assert result.logprobs is None
            continue
        assert result.logprobs is not None
        assert result.logprobs.token_id == result.token_id
        assert result.logprobs.logprob == pytest.approx(raw[result.token_id].item(), abs=1e-5)
        expected = raw.topk(state.sampling.logprobs)
        assert [token for token, _ in result.logprobs.top] == expected.indices.tolist()
        assert [value for _, value in result.logprobs.top] == pytest.approx(expected.values.tolist(), abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(states, min_size=2, max_size=6), seed=st.integers(0, 1000))
def test_a_row_does_not_know_its_neighbours(rows: list[SequenceState], seed: int) -> None:
    logits = random_logits(len(rows), seed=seed)
    together = sample(logits.clone(), rows)
    assert together == [sample(logits[i : i + 1].clone(), [state])[0] for i, state in enumerate(rows)]
    assert together[::-1] == sample(logits.flip(0), rows[::-1])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 8},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "presence_penalty": 1.0},
    ],
)
def test_frequencies_match_the_softmax(options: dict[str, Any]) -> None:
    num_draws = 4000
    logits = random_logits(1, 24, scale=1.5)[0]
    rows = [sequence((1, 2), (3,), seed=seed, **options) for seed in range(num_draws)]
    expected = slow_probabilities(slow_logits(logits, rows[0]), rows[0].sampling)
    results = sample(logits.repeat(num_draws, 1), rows)
    counts = torch.bincount(torch.tensor([result.token_id for result in results]), minlength=24).tolist()
    cells = [(count, p * num_draws) for count, p in zip(counts, expected, strict=True)]
    assert all(count == 0 for count, mean in cells if mean == 0)
    chi_square = sum((count - mean) ** 2 / mean for count, mean in cells if mean > 0)
    degrees = sum(mean > 0 for _, mean in cells) - 1
    assert chi_square < degrees + 4.5 * math.sqrt(2 * degrees)  # seeds are fixed: passes always or never


def test_positions_of_one_seed_are_independent_draws() -> None:
    logits = random_logits(1, 8, scale=1.0)
    rows = [sequence((1,), tuple([0] * n), seed=5) for n in range(4000)]
    chosen = torch.tensor(draw(logits.repeat(4000, 1), rows))
    counts = torch.bincount(chosen, minlength=8).double()
    expected = logits[0].double().softmax(-1) * 4000
    assert ((counts - expected) ** 2 / expected).sum() < 7 + 4.5 * math.sqrt(14)
    # The pairs of neighbours, too.
    pairs = torch.bincount(chosen[0::2] * 8 + chosen[1::2], minlength=64).double()
    both = torch.outer(expected, expected).flatten() * 2000 / 4000**2
    assert ((pairs - both) ** 2 / both).sum() < 63 + 4.5 * math.sqrt(126)


OPTIONS = [
    {},
    {"top_p": 0.9},
    {"top_k": 5},
    {"top_p": 0.5, "min_p": 0.2},
    {"min_p": 0.1},
    {"top_k": 30, "top_p": 0.8},
    {"top_k": 40, "top_p": 0.1},
]


@pytest.mark.parametrize("name", ["PIECE_ELEMENTS", "NUM_BEST"])
def test_sizes_of_the_work_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(210)
    rows = [sequence(seed=seed, **OPTIONS[seed % len(OPTIONS)]) for seed in range(210)]
    chosen = draw(logits, rows)
    monkeypatch.setattr(sampler, name, {"cpu": 200} if name == "PIECE_ELEMENTS" else 4)
    assert draw(logits, rows) == chosen


def test_the_same_seed_gives_the_same_token_and_another_seed_others() -> None:
    logits = random_logits(1, scale=1.0)
    first = [draw(logits, [sequence(seed=seed)])[0] for seed in range(40)]
    assert first == [draw(logits, [sequence(seed=seed)])[0] for seed in range(40)]
    assert len(set(first)) > 5


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, [9, 4, 30]] = 1.0
    assert [result.token_id for result in sample(logits, [sequence(temperature=0.0)] * 3)] == [4, 4, 4]


@pytest.mark.parametrize("temperature", [1e-40, 1e-5, 1e-3])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits = random_logits(5, scale=30.0)
    chosen = draw(logits, [sequence(temperature=temperature, seed=seed) for seed in range(5)])
    assert chosen == logits.argmax(-1).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_fails_alone(bad: float) -> None:
    logits = random_logits(3)
    rows = [sequence(sequence_id=i, seed=i, logprobs=1, top_p=0.9) for i in range(3)]
    alone = [sample(logits[i : i + 1].clone(), [rows[i]])[0] for i in (0, 2)]
    logits[1, 17] = bad
    results = sample(logits, rows)
    assert [results[0], results[2]] == alone
    assert results[1].sequence_id == 1
    assert results[1].error is not None
    assert results[1].logprobs is None


def test_ids_beyond_the_vocabulary_harm_nobody() -> None:
    state = sequence(logit_bias={VOCAB: 5.0, 10**9: 1.0}, min_tokens=2, stops=(VOCAB, 3), temperature=0.0)
    logits = random_logits(1)
    logits[0, 3] = 99.0
    assert sample(logits.clone(), [state])[0].token_id == logits[0].argsort(descending=True)[1]


def test_counts_follow_the_tokens() -> None:
    state = sequence((4, 4, 5), (), frequency_penalty=2.0, temperature=0.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, :10] = torch.tensor([0.0, 0, 0, 0, 3.5, 0, 0, 0, 2.0, 0])
    chosen = []
    for _ in range(4):
        chosen.append(sample(logits.clone(), [state])[0].token_id)
        state.token_ids.append(chosen[-1])
    assert chosen == [4, 8, 4, 0]
    assert list(zip(state.counts.ids, state.counts.counts, strict=True)) == [(4, 2), (5, 0), (8, 1), (0, 1)]


def test_prompt_logprobs_over_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "PIECE_ROWS", 4)
    state = sequence(tuple(range(20)), prompt_logprobs=2)
    logits = random_logits(15)
    prompt = PromptRows(state=state, row=2, start=5, count=11)
    (described,) = describe_prompts(logits, [prompt])
    assert (described.start, len(described.entries)) == (5, 11)
    for i, entry in enumerate(described.entries):
        raw = logits[2 + i].log_softmax(-1)
        assert entry.token_id == 5 + i
        assert entry.logprob == pytest.approx(raw[5 + i].item(), abs=1e-5)
        assert [token for token, _ in entry.top] == raw.topk(2).indices.tolist()
