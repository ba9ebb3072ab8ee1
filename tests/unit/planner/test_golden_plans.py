"""Two plans for Qwen3-235B-A22B against arithmetic by hand.

94 layers, hidden 4,096; 64 query heads and 4 KV heads, 128 wide; 128 experts of 1,536, 8 for a token; vocabulary
151,936. One layer of the checkpoint:

    q and o        2 x 4,096 x 8,192 =               67,108,864
    k and v        2 x 4,096 x 512 =                  4,194,304
    experts        128 x 3 x 4,096 x 1,536 =      2,415,919,104
    router         4,096 x 128 =                        524,288
    norms          2 x 4,096 + 2 x 128 =                  8,448
                                                  2,487,755,008

94 of them have 233,848,970,752; embedding and head 2 x 151,936 x 4,096 = 1,244,659,712; the last norm 4,096. That is
235,093,634,560 parameters.

Both plans share attention over 8 ranks, each with 8 query heads and a copy of one KV head:

    q and o 2 x 4,096 x 1,024 + k and v 2 x 4,096 x 128 = 9,437,184 of a layer, in 94 layers 887,095,296
    router and norms, all of them, 532,736 of a layer, with the last norm 50,081,280
    embedding and head 2 x 18,992 x 4,096 = 155,582,464
    KV cache of a token 94 x 2 x 128 x 2 bytes = 48,128

Beside weights and KV cache there are cosines and sines of 40,960 positions, 40,960 x 128 x 2 bytes = 10,485,760, and
CUDA's and NCCL's own 700 + 500 MiB = 1,258,291,200.
"""

from __future__ import annotations

from typing import Any

import pytest

from qwen_ray.core.hardware import GIB, Hardware
from qwen_ray.planner.candidate import Candidate, PlanRequest
from qwen_ray.planner.explain import describe
from qwen_ray.planner.family import lookup
from qwen_ray.planner.search import plan

KV_TOKEN, TABLES, RESERVE = 48_128, 10_485_760, 1_258_291_200


def ask(hardware: str, **wishes: Any) -> PlanRequest:
    config = lookup("Qwen/Qwen3-235B-A22B")
    assert config is not None
    return PlanRequest(config=config, hardware=Hardware.parse(hardware), **wishes)


def check_ranks(chosen: Candidate, *, usable: int, weights: int, activations: int) -> None:
    """What is left of a rank's usable memory is KV cache, in blocks of 16 tokens."""
    for rank in chosen.ranks:
        assert (rank.weights, rank.activations) == (weights, activations)
        assert (rank.tables, rank.reserve, rank.kv_per_block) == (TABLES, RESERVE, 16 * KV_TOKEN)
    assert chosen.engine.num_blocks == (usable - weights - activations - TABLES - RESERVE) // (16 * KV_TOKEN)
    assert chosen.engine.max_model_len == 40_960


def test_in_bfloat16_on_two_nodes_of_eight_h100() -> None:
    """470 GB need seven of 79.6 GiB x 0.9 = 76.92 GB: one replica on each node.

    Experts are cut over all eight ranks, 192 of 1,536 each: of whole ones, some rank would read more than others.
    """
    report = plan(ask("2x8xH100-80G"))
    chosen = report.require()
    division = chosen.plan
    assert (division.tp, division.pp, division.dp, division.ep, division.dp_attention) == (8, 1, 2, 1, 1)
    assert chosen.placement == ((0,), (1,))

    # Experts of a rank: 94 x 128 x 3 x 4,096 x 192 = 28,387,049,472.
    weights = 2 * (887_095_296 + 28_387_049_472 + 50_081_280 + 155_582_464)
    # 2,048 tokens in a layer with experts. Router and choices 2,048 x (128 x 10 + 8 x 16) = 2,883,584; what is added
    # up over ranks 2,048 x 4,096 x 2 = 16,777,216; answers of pieces and put together, twice that; 16,384 choices of
    # 3 x 4,096 + 3 x 192 numbers 421,527,552; their sum in float32 33,554,432; residual and normed copy 33,554,432.
    activations = 2_883_584 + 16_777_216 + 33_554_432 + 421_527_552 + 33_554_432 + 33_554_432
    check_ranks(chosen, usable=int(int(79.6 * GIB) * 0.9), weights=weights, activations=activations)

    # Eight ranks hold 471.68 GB, 2 x 235,093,634,560 bytes are 470.19 GB. Copies: 8 KV heads for 4,
    # 94 x 4 x 1,048,576 x 2 = 0.79 GB; routers and norms 7 x 50,081,280 x 2 = 0.70 GB.
    assert 8 * weights == 2 * 235_093_634_560 + 94 * 4 * 1_048_576 * 2 + 7 * 50_081_280 * 2
    text = describe(report)
    assert "235.09 B parameters, 22.19 B active" in text
    assert (
        "weights of all ranks 471.68 GB = checkpoint 470.19 GB + copies 1.49 GB "
        "(attention 0.79 GB, norms and routers 0.70 GB)" in text
    )

    # One token of each of 32 requests, after 1,152 on average. A rank reads attention, router and norms 937,172,480
    # (without the last norm), half of its ends 77,791,232, 128 x (1 - (15/16)^32) = 111.77 parts of experts
    # 94 x 111.77 x 2,359,296 = 24.787e9, and 32 x 1,152 x 24,064 = 887,095,296 of KV: 26.69e9 x 2 bytes at 0.7 x 3,350
    # GB/s are 22.76 ms. A step costs 2 ms; 189 all-reduces 10 us and 32 x 2 x 7/8 x 8,192 bytes at 450 GB/s, 1.02 us
    # each: 2.08 ms; logits 10 + 43 us.
    assert chosen.estimate is not None
    assert chosen.estimate.tpot == pytest.approx(22.76e-3 + 2e-3 + 2.08e-3 + 0.05e-3, rel=2e-3)


def test_in_fp8_on_eight_h200() -> None:
    """A replica takes 29.7 of a rank's 139.8 GiB x 0.9 = 135.1 GB.

    Eighths of an expert, 192, would break FP8's blocks of 128: 16 whole experts on each rank.
    """
    report = plan(ask("8xH200-141G", dtype="fp8"))
    chosen = report.require()
    division = chosen.plan
    assert (division.tp, division.pp, division.dp, division.ep, division.dp_attention) == (8, 1, 1, 8, 1)
    assert any("192 mod 128 = 64" in (candidate.reason or "") for candidate in report.candidates)

    # Experts of a rank: 94 x 16 x 3 x 4,096 x 1,536 = 28,387,049,472, like attention in 1 byte; the rest in 2.
    weights = 887_095_296 + 28_387_049_472 + 2 * (50_081_280 + 155_582_464)
    # As above, but for 16,384 choices of 3 x 4,096 + 3 x 1,536 numbers in bf16, 553,648,128.
    activations = 2_883_584 + 16_777_216 + 33_554_432 + 553_648_128 + 33_554_432 + 33_554_432
    check_ranks(chosen, usable=int(int(139.8 * GIB) * 0.9), weights=weights, activations=activations)

    # The checkpoint: 94 x 2,487,222,272 + 2 x (94 x 532,736 + 4,096 + 1,244,659,712) = 236.39 GB.
    checkpoint = 94 * 2_487_222_272 + 2 * (50_081_280 + 1_244_659_712)
    assert 8 * weights == checkpoint + 94 * 4 * 1_048_576 + 7 * 50_081_280 * 2
    text = describe(report)
    assert "weights of all ranks 237.48 GB = checkpoint 236.39 GB + copies 1.10 GB" in text
    assert "8 expert ranks of 16 slots" in text
    assert "can be planned with, not served" in text

    # One token of each of 64 requests. Of a rank's 16 experts 16 x (1 - (15/16)^64) = 15.7 are touched, on the fullest
    # of eight ranks all: 28.387 GB; attention 0.887, router and norms 0.100, half of the ends 0.156, KV
    # 64 x 1,152 x 48,128 = 3.548: 33.08 GB at 0.7 x 4,800 GB/s are 9.84 ms. A step costs 2 ms; 189 all-reduces 10 and
    # 64 x 2 x 7/8 x 8,192 bytes at 450 GB/s, 2.04 us each: 2.28 ms; logits 10 + 86 us.
    assert chosen.estimate is not None
    assert chosen.estimate.tpot == pytest.approx(9.84e-3 + 2e-3 + 2.28e-3 + 0.1e-3, rel=2e-3)
