"""What ranks count of their experts, put together."""

from __future__ import annotations

from dataclasses import replace

from qwen_ray.core.stats import ExpertLoad, RankStats

# Two stages of two expert ranks. Layer 1 is dense. Expert 2 of layer 0 has a copy on each rank.
RANK = RankStats(rank=0, stage=0, tp_rank=0, pid=1, node="n", device="cpu")
RANKS = (
    replace(RANK, expert_tokens=((5, 0, 2), ())),
    replace(RANK, ep_rank=1, expert_tokens=((0, 1, 2), ())),
    replace(RANK, stage=1, first_layer=2, expert_tokens=((4, 0, 0),)),
    replace(RANK, stage=1, first_layer=2, ep_rank=1, expert_tokens=((0, 2, 4),)),
)


def test_copies_add_up_and_layers_keep_their_place() -> None:
    load = ExpertLoad.of(RANKS[::-1])
    assert load.by_expert == ((5, 1, 4), (), (4, 2, 4))
    assert load.by_rank == ((7, 3), (), (4, 6))
    assert load.num_tokens == 20


def test_parts_of_one_expert_count_once() -> None:
    halves = tuple(replace(rank, expert_tp_rank=1) for rank in RANKS)
    assert ExpertLoad.of(RANKS + halves) == ExpertLoad.of(RANKS)


def test_imbalance_is_what_each_layer_waits_for() -> None:
    assert ExpertLoad.of(RANKS).imbalance == (7 + 6) / (5 + 5)
    assert ExpertLoad().imbalance == 1.0


def test_a_window_between_two_counts() -> None:
    before = ExpertLoad.of(RANKS)
    after = ExpertLoad.of((replace(RANKS[0], expert_tokens=((6, 0, 2), ())), *RANKS[1:]))
    assert after.since(before).by_expert == ((1, 0, 0), (), (0, 0, 0))
    assert after.since(before).by_rank == ((1, 0), (), (0, 0))
    assert after.since(ExpertLoad()) == after
    assert before.since(after) == before  # counts went back: the ranks are new
