"""The counter-based noise: known integers, Gumbel's distribution, no correlation between streams."""

from __future__ import annotations

import math

import torch

from qwen_ray.worker.noise import BITS, GOLDEN, MAX_GUMBEL, MIN_GUMBEL, gumbel, stream_key

EULER = 0.5772156649


def splitmix64(key: int, index: int) -> int:
    """Output `index` of the published generator started at `key`, in plain integers."""
    z = (key + (index + 1) * GOLDEN) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return z ^ (z >> 31)


def test_the_published_first_outputs_of_splitmix64() -> None:
    # seed 1234567, from the reference implementation's documentation
    assert [splitmix64(1234567, i) for i in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_tensor_arithmetic_is_that_of_plain_integers() -> None:
    keys = [stream_key(seed, position) for seed in (0, 1, 2**63, 2**64 - 1) for position in (0, 7, 131071)]
    ids = torch.tensor([0, 1, 151_935])
    noise = gumbel(torch.tensor(keys)[:, None], ids)
    for row, key in enumerate(keys):
        for column, token_id in enumerate(ids.tolist()):
            uniform = ((splitmix64(key, token_id) >> (64 - BITS)) + 0.5) / 2**BITS
            assert math.isclose(noise[row, column].item(), -math.log(-math.log(uniform)), rel_tol=1e-12, abs_tol=1e-12)


def test_keys_differ_for_every_seed_and_position() -> None:
    keys = {stream_key(seed, position) for seed in range(-200, 200) for position in range(200)}
    assert len(keys) == 400 * 200
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_mean_variance_and_bounds() -> None:
    noise = gumbel(torch.tensor([[stream_key(3, p)] for p in range(20)]), torch.arange(50_000))
    assert abs(noise.mean().item() - EULER) < 0.005
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.01
    assert MIN_GUMBEL <= noise.min().item() < -2
    assert 10 < noise.max().item() <= MAX_GUMBEL
    assert (gumbel_of(0), gumbel_of(2**BITS - 1)) == (MIN_GUMBEL, MAX_GUMBEL)


def gumbel_of(integer: int) -> float:
    return -math.log(-math.log((integer + 0.5) / 2**BITS))


def test_neighbouring_positions_and_seeds_are_not_correlated() -> None:
    pairs = [(5, 10), (5, 11), (6, 10)]
    rows = torch.cat([gumbel(torch.tensor([[stream_key(*pair)]]), torch.arange(50_000)) for pair in pairs])
    correlation = torch.corrcoef(rows) - torch.eye(3, dtype=rows.dtype)
    assert correlation.abs().max() < 0.02
