"""Random numbers without a generator: each is a function of (seed, position, token id) and of nothing else.

A splitmix64 stream (Steele, Lea and Flood 2014) for each (seed, position), read at the token id. The same integers on
every device; torch's int64 wraps around as the algorithm needs it.
"""

from __future__ import annotations

import math

import torch

GOLDEN = 0x9E3779B97F4A7C15
FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
MASK = 2**64 - 1
BITS = 32

MIN_GUMBEL = -math.log(-math.log(0.5 / 2**BITS))  # about -3.1
MAX_GUMBEL = -math.log(-math.log1p(-0.5 / 2**BITS))  # about 22.9


def stream_key(seed: int, position: int) -> int:
    """A signed 64-bit key for one draw."""
    key = _mix_int(_mix_int(seed + GOLDEN) + position * GOLDEN)
    return _signed(key)


def gumbel(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise as float64, between MIN_GUMBEL and MAX_GUMBEL, for int64 keys and ids that broadcast."""
    z = keys + (token_ids + 1) * _signed(GOLDEN)
    for shift, factor in FACTORS:
        z = (z ^ _shift_right(z, shift)) * _signed(factor)
    z = _shift_right(z ^ _shift_right(z, 31), 64 - BITS)
    uniform = (z.double() + 0.5) / 2**BITS  # in (0, 1), both ends excluded
    return -torch.log(-torch.log(uniform))


def _shift_right(z: torch.Tensor, count: int) -> torch.Tensor:
    """Logical, where torch's own keeps the sign."""
    return (z >> count) & ((1 << (64 - count)) - 1)


def _mix_int(z: int) -> int:
    z &= MASK
    for shift, factor in FACTORS:
        z = ((z ^ (z >> shift)) * factor) & MASK
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    z &= MASK
    return z - 2**64 if z >= 2**63 else z
