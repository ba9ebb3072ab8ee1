"""Experts on ranks: every expert somewhere, the fullest rank relieved, and nothing moved for nothing."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.core.errors import PlanRefused, SettingsError
from qwen_ray.core.plan import ExpertPlacement
from qwen_ray.planner.experts import ExpertLoadFile, balance, even_slots, imbalance, layer_imbalances, rank_tokens
from qwen_ray.planner.family import lookup


@st.composite
def loads(draw: st.DrawFn) -> tuple[list[list[float]], int, tuple[int, ...]]:
    num_experts = draw(st.integers(2, 12))
    ep = draw(st.integers(1, min(5, num_experts)))
    num_redundant = draw(st.integers(0, num_experts * (ep - 1)))
    layer = st.lists(st.integers(0, 1000).map(float), min_size=num_experts, max_size=num_experts)
    layers = draw(st.lists(layer | st.just([]), min_size=1, max_size=3))
    return layers, ep, even_slots(num_experts, ep, num_redundant)


@given(case=loads())
@settings(max_examples=150, deadline=None)
def test_every_expert_has_a_place_and_no_rank_two_copies(case: tuple[list[list[float]], int, tuple[int, ...]]) -> None:
    layers, ep, num_slots = case
    placement = balance(layers, ep=ep, num_slots=num_slots)
    for tokens, slots in zip(layers, placement.slots, strict=True):
        assert bool(slots) == bool(tokens)
        if slots:
            assert tuple(map(len, slots)) == num_slots
            assert set().union(*slots) == set(range(len(tokens)))
            assert all(len(set(own)) == len(own) for own in slots)
            assert sum(rank_tokens(tokens, slots)) == pytest.approx(sum(tokens))
    assert balance(layers, ep=ep, num_slots=num_slots, current=placement) == placement


@given(case=loads(), seed=st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_no_layer_gets_worse_and_one_that_gains_nothing_stays(
    case: tuple[list[list[float]], int, tuple[int, ...]], seed: random.Random
) -> None:
    layers, ep, num_slots = case
    shuffled = [seed.sample(tokens, len(tokens)) for tokens in layers]
    current = balance(shuffled, ep=ep, num_slots=num_slots)
    new = balance(layers, ep=ep, num_slots=num_slots, current=current)
    for tokens, before, after in zip(layers, current.slots, new.slots, strict=True):
        if tokens and before != after:
            assert tuple(map(len, after)) == num_slots
            assert max(rank_tokens(tokens, after)) < max(rank_tokens(tokens, before))


def test_a_hot_expert_is_copied_and_the_rest_packed() -> None:
    """Expert 0 has 60 of 100 tokens: its two copies have 30 each, and beside them lie 20 + 0 and 10 + 10."""
    tokens = [[60.0, 20.0, 10.0, 10.0, 0.0]]
    even = ExpertPlacement(slots=(((0, 1, 2), (3, 4, 0)),))
    found = balance(tokens, ep=2, num_slots=(3, 3), current=even)
    assert sorted(rank_tokens(tokens[0], found.slots[0])) == [50, 50]
    assert imbalance(tokens, even) == pytest.approx(1.2)
    assert imbalance(tokens, found) == 1.0


def test_packing_is_mended_by_exchanges() -> None:
    """The heaviest first would lie with one of the others, as the other rank has one slot only."""
    tokens = [[1.0, 1.0, 2.0]]
    assert imbalance(tokens, balance(tokens, ep=2, num_slots=(2, 1))) == 1.0


def test_experts_stay_where_they_can() -> None:
    """Both hot experts are on rank 1; one of them changes places with a cold one, and nothing else moves."""
    current = ExpertPlacement(slots=(((5, 2, 3), (0, 1, 4)),))
    tokens = [[100.0, 90.0, 1.0, 1.0, 1.0, 1.0]]
    found = balance(tokens, ep=2, num_slots=(3, 3), current=current)
    assert layer_imbalances(tokens, found)[0] < layer_imbalances(tokens, current)[0]
    changed = [
        (a, b)
        for before, after in zip(current.slots[0], found.slots[0], strict=True)
        for a, b in zip(before, after, strict=True)
        if a != b
    ]
    assert len(changed) == 2


@pytest.mark.parametrize("num_redundant", [0, 16])
def test_a_load_that_has_changed_a_little_moves_little(num_redundant: int) -> None:
    chance = random.Random(0)
    load = [[chance.paretovariate(2) for _ in range(128)] for _ in range(4)]
    num_slots = even_slots(128, 8, num_redundant)
    current = balance(load, ep=8, num_slots=num_slots)
    changed = [[expert * chance.paretovariate(4) for expert in layer] for layer in load]
    found = balance(changed, ep=8, num_slots=num_slots, current=current)
    again = balance(changed, ep=8, num_slots=num_slots)
    assert imbalance(changed, found) < imbalance(changed, again) * 1.03
    assert imbalance(changed, current) - 1 > 1.5 * (imbalance(changed, found) - 1)
    before, after = ([expert for layer in p.slots for own in layer for expert in own] for p in (current, found))
    assert sum(a != b for a, b in zip(before, after, strict=True)) < len(before) / 6


def test_what_one_layer_cannot_even_out_falls_on_another_rank_in_the_next() -> None:
    tokens = [[90.0, 5.0, 5.0, 0.0]] * 4
    found = balance(tokens, ep=2, num_slots=(2, 2))
    assert layer_imbalances(tokens, found) == (1.8,) * 4
    assert [sum(ranks) for ranks in zip(*map(rank_tokens, tokens, found.slots), strict=True)] == [200, 200]


def test_dense_layers_and_no_tokens_are_balanced() -> None:
    placement = ExpertPlacement(slots=((), ((0,), (1,))))
    assert imbalance([[], [0.0, 0.0]], placement) == 1.0
    assert layer_imbalances([[], [3.0, 1.0]], placement) == (1.0, 1.5)
    assert imbalance([[3.0, 1.0], [1.0, 3.0]], ExpertPlacement(slots=(((0,), (1,)),) * 2)) == 1.5
    assert imbalance([[]], ExpertPlacement(slots=((),))) == 1.0


def test_slots_that_do_not_match_are_refused() -> None:
    with pytest.raises(PlanRefused, match="3 slots"):
        balance([[1.0] * 4], ep=2, num_slots=(2, 1))
    with pytest.raises(PlanRefused, match="9 slots"):
        balance([[1.0] * 4], ep=2, num_slots=(5, 4))
    with pytest.raises(PlanRefused, match="expert ranks"):
        balance([[1.0] * 4], ep=2, num_slots=(3, 1))


def test_a_load_file_is_read_back() -> None:
    load = ExpertLoadFile(model="m", num_experts=2, expert_tokens=((), (1, 2.5)))
    assert ExpertLoadFile.from_json(json.loads(json.dumps(load.to_json())), origin="load.json") == load


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ([], "not a JSON object"),
        ({"num_experts": 2, "expert_tokens": [], "experts": 3}, "experts: unknown key"),
        ({"num_experts": 0, "expert_tokens": []}, "num_experts"),
        ({"num_experts": 2}, "expert_tokens"),
        ({"num_experts": 2, "expert_tokens": [[1, 2], 3]}, r"expert_tokens\[1\]"),
        ({"num_experts": 2, "expert_tokens": [[1]]}, r"expert_tokens\[0\]"),
        ({"num_experts": 2, "expert_tokens": [[1, -1]]}, r"expert_tokens\[0\]"),
        ({"num_experts": 2, "expert_tokens": [], "model": 1}, "model"),
    ],
)
def test_a_wrong_load_file_is_named(value: object, field: str) -> None:
    with pytest.raises(SettingsError, match=f"load.json: {field}"):
        ExpertLoadFile.from_json(value, origin="load.json")


def test_the_load_of_another_model_is_refused() -> None:
    config = lookup("qwen3-30b-a3b")
    assert config is not None
    rows = ((1.0,) * 128,) * 48
    ExpertLoadFile(model="", num_experts=128, expert_tokens=rows).check(config, origin="f")
    for load, field in (
        (ExpertLoadFile(model="", num_experts=64, expert_tokens=()), "num_experts"),
        (ExpertLoadFile(model="", num_experts=128, expert_tokens=rows[:-1]), "expert_tokens"),
        (ExpertLoadFile(model="", num_experts=128, expert_tokens=((), *rows[1:])), r"expert_tokens\[0\]"),
    ):
        with pytest.raises(SettingsError, match=field):
            load.check(config, origin="f")
