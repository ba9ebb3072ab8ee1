"""The counter-based noise: known integers, Gumbel's distribution, no correlation between streams."""

from __future__ import annotations

import math

import torch

from qwen_ray.worker.noise import BITS, GOLDEN, gumbel, stream_key

EULER = 0.5772156649
IDS = torch.arange(50_000, dtype=torch.int32)


def keys_of(*pairs: tuple[int, int]) -> torch.Tensor:
    return torch.tensor([stream_key(*pair) for pair in pairs], dtype=torch.int32)


def lowbias32(z: int) -> int:
    """As published, in plain integers."""
    z &= 2**32 - 1
    z = (z ^ (z >> 16)) * 0x7FEB352D & (2**32 - 1)
    z = (z ^ (z >> 15)) * 0x846CA68B & (2**32 - 1)
    return z ^ (z >> 16)


def slow_gumbel(key: tuple[int, int], token_id: int) -> float:
    low, high = (word & (2**32 - 1) for word in key)
    z = lowbias32(lowbias32(token_id * GOLDEN + low) ^ high) & (2**BITS - 1)
    return -math.log(-math.log1p(-(z + 0.5) / 2**BITS))


def test_tensor_arithmetic_is_that_of_plain_integers() -> None:
    pairs = [(seed, position) for seed in (0, 1, 2**63, 2**64 - 1) for position in (0, 7, 131071)]
    ids = torch.cat([torch.arange(67), torch.tensor([49_151, 151_935])]).int()  # an odd number: vectors and a rest
    noise = gumbel(keys_of(*pairs), ids)
    for row, pair in enumerate(pairs):
        expected = torch.tensor([slow_gumbel(stream_key(*pair), token_id) for token_id in ids.tolist()])
        torch.testing.assert_close(noise[row], expected, rtol=1e-4, atol=1e-5)


def test_keys_differ_for_every_seed_and_position() -> None:
    keys = {stream_key(seed, position) for seed in range(-200, 200) for position in range(200)}
    assert len(keys) == 400 * 200
    assert all(-(2**31) <= word < 2**31 for key in keys for word in key)


def test_mean_variance_and_bounds() -> None:
    noise = gumbel(keys_of(*((3, p) for p in range(20))), IDS).double()
    assert abs(noise.mean().item() - EULER) < 0.005
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.01
    assert noise.min().item() < -2
    assert 10 < noise.max().item() < 22.2


def test_neighbouring_positions_and_seeds_are_not_correlated() -> None:
    rows = gumbel(keys_of((5, 10), (5, 11), (6, 10), (5, 2**20)), IDS).double()
    rows = torch.cat([rows, rows[:1].roll(1), rows[:1].roll(64)])  # and neighbouring tokens
    correlation = torch.corrcoef(rows) - torch.eye(6, dtype=rows.dtype)
    assert correlation.abs().max() < 0.02


def test_every_token_wins_as_often_as_the_others() -> None:
    """Equal logits over 64 tokens, for 64 seeds at 200 positions."""
    noise = gumbel(keys_of(*((seed, p) for seed in range(64) for p in range(200))), IDS[:64])
    counts = torch.bincount(noise.argmax(-1), minlength=64).double()
    chi_square = ((counts - 200) ** 2 / 200).sum().item()
    assert chi_square < 63 + 4.5 * math.sqrt(2 * 63)
