"""Products with weights in 8 or 4 bits on CUDA. Activations are multiplied as they are.

Few rows: one kernel reads the packed words, widens them in registers and multiplies. Many rows: another widens some
thousand rows of the matrix at a time, and torch multiplies.
"""

# What Triton's kernels say they take is what they get of it: tensors and numbers of the host's go in.
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from qwen_ray.kernels.cuda import packed_kernels
from qwen_ray.kernels.quantized import LANES, ROWS_AT_ONCE, PackedWeight

DTYPES = (torch.bfloat16, torch.float16)  # of x, for the kernel
FEW_ROWS = 64  # of x: up to so many the kernel multiplies, beyond them torch
ROWS = (16, 32)  # of x in a program. With 64 Hopper would take other instructions, and rows other sums.
OUTPUTS = 32  # of a program
WORDS = 32  # of a row of weights that a program multiplies at once
PROGRAMS = 256  # that are wanted: a matrix of fewer outputs is cut along its columns, too
LEAST_STEPS = 2  # of WORDS words, in such a part


def linear_packed(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """[T, in] by [out, in] to [T, out], in x's dtype: float32, bfloat16 or float16. As `quantized.linear_packed`.

    Nothing is added up in an order that may change. Up to FEW_ROWS rows of DTYPES, a row's result does not depend on
    how many others there are, nor on which; beyond, as far as torch's products do not.
    """
    if x.shape[0] > FEW_ROWS or x.dtype not in DTYPES:
        return multiply_wide(x, weight, bias, F.linear)
    return multiply_few(x, weight, bias, ROWS[x.shape[0] > ROWS[0]])


def widen(weight: PackedWeight, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Some rows, [n, in]: to the last bit those of `quantized.dequantize`, then of `dtype`."""
    out = torch.empty(rows.stop - rows.start, weight.size, dtype=dtype, device=weight.values.device)
    if out.numel() == 0:
        return out
    least = weight.scales if weight.least is None else weight.least
    num_words = weight.values.shape[1]
    packed_kernels.widen[(_ceil(len(out), LANES), _ceil(num_words, WORDS))](
        weight.values.view(torch.int32),
        weight.scales,
        least,
        out,
        rows.start,
        len(out),
        weight.size,
        num_words,
        BITS=weight.bits,
        GROUP=weight.group,
        ROWS=LANES,
        WORDS=WORDS,
    )
    return out


def multiply_wide(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
) -> torch.Tensor:
    """With what `linear` makes of some widened rows of the matrix at a time."""
    out: torch.Tensor | None = None
    for start in range(0, weight.out_size, ROWS_AT_ONCE):
        own = slice(start, min(start + ROWS_AT_ONCE, weight.out_size))
        part = linear(x, widen(weight, own, x.dtype), None if bias is None else bias[own])
        if own.stop - own.start == weight.out_size:
            return part
        out = x.new_empty(x.shape[0], weight.out_size) if out is None else out
        out[:, own] = part
    return x.new_empty(x.shape[0], 0) if out is None else out


def num_splits(num_words: int, out_size: int) -> int:
    """Parts that a matrix's columns are multiplied in: by its own sizes, whatever it is multiplied with."""
    num_steps = _ceil(num_words, WORDS)
    wanted = max(1, min(_ceil(PROGRAMS, _ceil(out_size, OUTPUTS)), num_steps // LEAST_STEPS))
    return _ceil(num_steps, _ceil(num_steps, wanted))


def multiply_few(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, block_rows: int) -> torch.Tensor:
    """As the kernel multiplies them, `block_rows` of x in a program."""
    if x.numel() == 0:
        return x.new_zeros(x.shape[0], weight.out_size) + (0 if bias is None else bias)
    x = x if x.stride(1) == 1 else x.contiguous()
    num_rows, num_words = x.shape[0], weight.values.shape[1]
    splits = num_splits(num_words, weight.out_size)
    out = x.new_empty(num_rows, weight.out_size)
    sums = out if splits == 1 else x.new_empty(splits, num_rows, weight.out_size, dtype=torch.float32)
    least = weight.scales if weight.least is None else weight.least
    own_bias = weight.scales if bias is None else bias
    packed_kernels.multiply[(_ceil(weight.out_size, OUTPUTS), _ceil(num_rows, block_rows), splits)](
        x,
        weight.values.view(torch.int32),
        weight.scales,
        least,
        own_bias,
        sums,
        num_rows,
        weight.out_size,
        weight.size,
        num_words,
        x.stride(0),
        STEPS=_ceil(_ceil(num_words, WORDS), splits),
        BITS=weight.bits,
        GROUP=weight.group,
        HAS_BIAS=bias is not None,
        IS_WHOLE=splits == 1,
        ROWS=block_rows,
        OUTPUTS=OUTPUTS,
        WORDS=WORDS,
    )
    if splits > 1:
        packed_kernels.add_up[(_ceil(weight.out_size, 256), num_rows)](
            sums,
            weight.scales,
            own_bias,
            out,
            num_rows,
            weight.out_size,
            SPLITS=splits,
            BITS=weight.bits,
            HAS_BIAS=bias is not None,
            OUTPUTS=256,
        )
    return out


def _ceil(count: int, of: int) -> int:
    return -(-count // of)
