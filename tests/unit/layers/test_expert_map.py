"""Where experts lie and what travels when that changes, for any placement."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.layers.exchange import pack, unpack
from qwen_ray.layers.expert_map import ExpertMap, Slots, in_rounds, settle, transfers

CPU = torch.device("cpu")


def placement(seed: int, num_experts: int, num_slots: list[int]) -> Slots:
    """Each expert at least once, none twice on a rank."""
    order = random.Random(seed)
    ranks: list[set[int]] = [set() for _ in num_slots]
    for expert in order.sample(range(num_experts), num_experts):
        free = [rank for rank, own in enumerate(ranks) if len(own) < num_slots[rank]]
        # The emptiest last of all: what is left for copies must fit each rank.
        ranks[max(free, key=lambda rank: (num_slots[rank] - len(ranks[rank]), order.random()))].add(expert)
    for rank, own in enumerate(ranks):
        others = sorted(set(range(num_experts)) - own)
        own.update(order.sample(others, num_slots[rank] - len(own)))
    return tuple(tuple(order.sample(sorted(own), len(own))) for own in ranks)


@st.composite
def changes(draw: st.DrawFn) -> tuple[int, Slots, Slots]:
    """(number of experts, placement, another one with as many slots)."""
    num_experts = draw(st.integers(1, 9))
    num_slots = draw(st.lists(st.integers(1, num_experts), min_size=1, max_size=4))
    num_slots[0] = min(num_experts, max(num_slots[0], num_experts - sum(num_slots[1:])))
    first, second = (placement(draw(st.integers(0, 999)), num_experts, num_slots) for _ in range(2))
    return num_experts, first, second


@given(changes())
@settings(max_examples=60, deadline=None)
def test_transfers_bring_the_wanted_experts(change: tuple[int, Slots, Slots]) -> None:
    _, now, wanted = change
    settled = settle(now, wanted)
    assert [set(own) for own in settled] == [set(own) for own in wanted]
    held = [list(own) for own in now]
    before = [tuple(own) for own in now]
    found = transfers(now, settled)
    for transfer in found:
        expert = before[transfer.source][transfer.source_slot]
        assert expert not in before[transfer.target], "what is there need not come"
        held[transfer.target][transfer.target_slot] = expert
    assert held == [list(own) for own in settled]
    assert len(found) == sum(len(set(new) - set(own)) for own, new in zip(now, wanted, strict=True))


@given(changes())
@settings(max_examples=60, deadline=None)
def test_no_rank_gives_or_takes_two_experts_in_a_round(change: tuple[int, Slots, Slots]) -> None:
    _, now, wanted = change
    found = transfers(now, settle(now, wanted))
    rounds = in_rounds(found)
    key = repr
    assert sorted((t for turn in rounds for t in turn), key=key) == sorted(found, key=key)
    for turn in rounds:
        assert len({t.source for t in turn}) == len({t.target for t in turn}) == len(turn)


def test_holders_share_the_giving() -> None:
    now, wanted = ((0, 1), (0, 2), (3, 4), (5, 6)), ((0, 1), (0, 2), (0, 4), (5, 0))
    assert [t.source for t in transfers(now, settle(now, wanted))] == [0, 1]


@given(changes())
@settings(max_examples=30, deadline=None)
def test_a_token_goes_to_a_copy_of_its_expert_and_positions_take_turns(change: tuple[int, Slots, Slots]) -> None:
    num_experts, slots, _ = change
    table = ExpertMap.of(slots, num_experts, CPU)
    ids = torch.arange(num_experts).expand(12, num_experts)
    places = table.choose(ids, torch.arange(12))
    for expert in range(num_experts):
        holders = [rank for rank, own in enumerate(slots) if expert in own]
        ranks = (places[:, expert] // table.width).tolist()
        assert ranks == [holders[position % len(holders)] for position in range(12)]
    for rank, own in enumerate(slots):
        here = table.slots_on(rank, places)
        assert ((here >= 0) == (places // table.width == rank)).all()
        assert (torch.tensor([*own, -1])[here] == torch.where(here >= 0, ids, -1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "top_k"), [(0, 3), (5, 3), (1, 1)])
def test_a_message_is_unpacked_as_it_was_packed(num_rows: int, top_k: int, dtype: torch.dtype) -> None:
    x = torch.randn(num_rows, 6).to(dtype)
    slots, weights = torch.randint(-1, 300, (num_rows, top_k)), torch.rand(num_rows, top_k)
    for got, want in zip(unpack(pack(x, slots, weights), top_k, dtype), (x, slots.int(), weights), strict=True):
        assert got.dtype is want.dtype
        assert torch.equal(got, want)
