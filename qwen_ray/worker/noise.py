"""Random numbers without a generator: each is a function of (seed, position, token id) and of nothing else.

(seed, position) is mixed into a 64-bit key by splitmix64 (Steele, Lea and Flood 2014) in plain integers; key and token
id by two rounds of the 32-bit hash `lowbias32` (Wellons 2018, hash-prospector) in tensors: 32-bit lanes are what makes
the noise for a whole vocabulary cheap. The same integers on every device; torch's int32 wraps as the hash needs it.
"""

from __future__ import annotations

import torch

GOLDEN = 0x9E3779B97F4A7C15
SPLITMIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
LOWBIAS = ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1))
BITS = 31  # of a uniform: as many as a float32 keeps where they matter, near 0


def stream_key(seed: int, position: int) -> tuple[int, int]:
    """Two signed 32-bit words for one draw."""
    key = _splitmix(_splitmix(seed + GOLDEN) + position * GOLDEN)
    return _signed(key), _signed(key >> 32)


def gumbel(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise [rows, n] float32, for keys [rows, 2] int32 and token ids [n] or [rows, n] int32.

    Never NaN; at most about 22.2, and as low as -inf once in 2^25.
    """
    z = token_ids * _signed(GOLDEN) + keys[:, :1]
    z = _lowbias_(z).bitwise_xor_(keys[:, 1:])
    z = _lowbias_(z).bitwise_and_(2**BITS - 1)
    # 1 - uniform rather than the uniform: large noise comes from where a float32 is finest.
    rest = z.float().add_(0.5).div_(2**BITS)
    return rest.neg_().log1p_().neg_().log_().neg_()


def _lowbias_(z: torch.Tensor) -> torch.Tensor:
    for shift, factor in LOWBIAS:
        # A logical shift, where torch's own keeps the sign.
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (32 - shift)) - 1))
        if factor != 1:
            z.mul_(_signed(factor))
    return z


def _splitmix(z: int) -> int:
    for shift, factor in SPLITMIX:
        z &= 2**64 - 1
        z = (z ^ (z >> shift)) * factor
    return z


def _signed(z: int) -> int:
    z &= 2**32 - 1
    return z - 2**32 if z >= 2**31 else z
