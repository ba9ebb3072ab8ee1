"""Triton's kernels of `packed.py`: weights in 8 or 4 bits are read as words, widened in registers, and multiplied.

Knows the order in which `kernels.quantized.PackedWeight` holds them: 16 rows side by side, a word of each in turn.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _read(
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    least_ptr: tl.tensor,
    rows: tl.tensor,  # of the matrix, [n]
    words_at: tl.tensor,  # of each of them, [m]
    is_row: tl.tensor,
    num_words: tl.tensor,
    size: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """Weights [n, m * 32 / BITS] float32; those of 8 bits without their scale."""
    blocks, lanes = (rows // 16).to(tl.int64), rows % 16
    places = (blocks * num_words * 16 + lanes)[:, None] + words_at[None, :] * 16
    words = tl.load(words_ptr + places, mask=is_row[:, None] & (words_at < num_words)[None, :], other=0)
    # A thread that has a word has all of its columns, side by side.
    if BITS == 8:
        wide = tl.join(
            tl.join(_byte(words, 0), _byte(words, 2)),
            tl.join(_byte(words, 1), _byte(words, 3)),
        )
    else:
        in_group: tl.constexpr = GROUP // 8
        own = (blocks * (num_words // in_group) * 16 + lanes)[:, None] + (words_at // in_group)[None, :] * 16
        # Behind a row's end scales may be anything, infinity perhaps.
        is_there = is_row[:, None] & (words_at * 8 < size)[None, :]
        scale = tl.load(scales_ptr + own, mask=is_there, other=0.0).to(tl.float32)
        least = tl.load(least_ptr + own, mask=is_there, other=0.0).to(tl.float32)
        even = tl.join(
            tl.join(_half(words, scale, least, 0), _half(words, scale, least, 4)),
            tl.join(_half(words, scale, least, 16), _half(words, scale, least, 20)),
        )
        odd = tl.join(
            tl.join(_half(words, scale, least, 8), _half(words, scale, least, 12)),
            tl.join(_half(words, scale, least, 24), _half(words, scale, least, 28)),
        )
        wide = tl.join(even, odd)
    return tl.reshape(wide, (rows.shape[0], words_at.shape[0] * (32 // BITS)))


@triton.jit
def _byte(words: tl.tensor, place: tl.constexpr) -> tl.tensor:
    return _float((words >> (8 * place)) & 255) - 128


@triton.jit
def _half(words: tl.tensor, scale: tl.tensor, least: tl.tensor, shift: tl.constexpr) -> tl.tensor:
    return least + _float((words >> shift) & 15) * scale


@triton.jit
def _float(small: tl.tensor) -> tl.tensor:
    """Of whole numbers below 2**23, which are the last bits of 2**23 + themselves: conversions take longer."""
    return (small | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _sum(
    x_rows: tl.tensor,  # [ROWS, 1], where each begins
    is_x: tl.tensor,
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    least_ptr: tl.tensor,
    outputs: tl.tensor,
    is_output: tl.tensor,
    first_step: tl.tensor,
    num_words: tl.tensor,
    size: tl.tensor,
    STEPS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WORDS: tl.constexpr,
) -> tl.tensor:
    """[ROWS, OUTPUTS] float32: of STEPS times WORDS words; of 8 bits without scales."""
    in_step: tl.constexpr = WORDS * (32 // BITS)
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for i in range(STEPS):
        step = first_step + i
        words_at = step * WORDS + tl.arange(0, WORDS)
        wide = _read(words_ptr, scales_ptr, least_ptr, outputs, words_at, is_output, num_words, size, BITS, GROUP)
        columns = step * in_step + tl.arange(0, in_step)
        x = tl.load(x_rows + columns[None, :], mask=is_x[:, None] & (columns < size)[None, :], other=0.0)
        total = tl.dot(x, tl.trans(wide.to(x.dtype)), total, out_dtype=tl.float32)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def multiply(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    least_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    out_size: tl.tensor,
    size: tl.tensor,
    num_words: tl.tensor,
    row_stride: tl.tensor,
    STEPS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """x [rows, in] by OUTPUTS rows of the matrix and STEPS times WORDS words of them.

    `out`: [rows, out], or where it is not whole [splits, rows, out] float32, with neither scales of rows nor bias.
    """
    split = tl.program_id(2)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row, is_output = rows < num_rows, outputs < out_size
    x_rows = x_ptr + rows[:, None].to(tl.int64) * row_stride
    total = _sum(
        x_rows, is_row, words_ptr, scales_ptr, least_ptr, outputs, is_output, split * STEPS, num_words, size,
        STEPS, BITS, GROUP, ROWS, OUTPUTS, WORDS,
    )  # fmt: skip
    if IS_WHOLE:
        if BITS == 8:
            total *= tl.load(scales_ptr + outputs, mask=is_output, other=0.0)[None, :]
        if HAS_BIAS:
            total += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
    places = (split * num_rows + rows)[:, None].to(tl.int64) * out_size + outputs[None, :]
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


@triton.jit(do_not_specialize=["num_choices"])
def multiply_tiles(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    least_ptr: tl.tensor,
    out_ptr: tl.tensor,
    choices_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    num_choices: tl.tensor,
    out_size: tl.tensor,
    size: tl.tensor,
    num_words: tl.tensor,
    row_stride: tl.tensor,
    words_stride: tl.tensor,
    scales_stride: tl.tensor,
    CHOICES_PER_ROW: tl.constexpr,
    STEPS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """Rows of x that a tile's choices belong to by OUTPUTS rows of its slot's matrix, to `out` [choices, out]."""
    slot = tl.load(slots_ptr + tl.program_id(1)).to(tl.int64)
    if slot >= 0:
        choices = tl.load(choices_ptr + tl.program_id(1) * ROWS + tl.arange(0, ROWS))
        outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        is_choice, is_output = choices < num_choices, outputs < out_size
        x_rows = x_ptr + (choices // CHOICES_PER_ROW)[:, None].to(tl.int64) * row_stride
        own_scales = scales_ptr + slot * scales_stride
        total = _sum(
            x_rows, is_choice, words_ptr + slot * words_stride, own_scales, least_ptr + slot * scales_stride,
            outputs, is_output, 0, num_words, size, STEPS, BITS, GROUP, ROWS, OUTPUTS, WORDS,
        )  # fmt: skip
        if BITS == 8:
            total *= tl.load(own_scales + outputs, mask=is_output, other=0.0)[None, :]
        places = choices[:, None].to(tl.int64) * out_size + outputs[None, :]
        tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=is_choice[:, None] & is_output[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def add_up(
    sums_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    out_size: tl.tensor,
    SPLITS: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
) -> None:
    """Of sums [splits, rows, out] one row, from the first split on."""
    row = tl.program_id(1)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = outputs < out_size
    total = tl.zeros((OUTPUTS,), dtype=tl.float32)
    for split in range(SPLITS):
        places = (split * num_rows + row).to(tl.int64) * out_size + outputs
        total += tl.load(sums_ptr + places, mask=is_output, other=0.0)
    if BITS == 8:
        total *= tl.load(scales_ptr + outputs, mask=is_output, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * out_size + outputs, total.to(out_ptr.dtype.element_ty), mask=is_output)


@triton.jit
def widen(
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    least_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first_row: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    num_words: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """ROWS rows and WORDS words of them, to `out` [rows, in]."""
    in_word: tl.constexpr = 32 // BITS
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    words_at = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    held = first_row + rows
    wide = _read(words_ptr, scales_ptr, least_ptr, held, words_at, is_row, num_words, size, BITS, GROUP)
    if BITS == 8:
        wide *= tl.load(scales_ptr + held, mask=is_row, other=0.0)[:, None]
    columns = tl.program_id(1) * WORDS * in_word + tl.arange(0, WORDS * in_word)
    out = out_ptr + rows[:, None].to(tl.int64) * size + columns[None, :]
    tl.store(out, wide.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & (columns < size)[None, :])
