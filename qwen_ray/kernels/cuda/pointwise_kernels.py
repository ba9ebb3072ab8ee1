"""Triton's kernels of `pointwise.py`: a program has one row, or one head of it."""

# pyright: reportAttributeAccessIssue=false
# Triton has no types for what a pointer points to.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read(row: tl.tensor, at: tl.tensor, is_there: tl.tensor) -> tl.tensor:
    """In float32; behind the end 0."""
    return tl.load(row + at, mask=is_there, other=0.0).to(tl.float32)


@triton.jit
def rounded(value: tl.tensor, like: tl.tensor) -> tl.tensor:
    """To what `like` points to, and back."""
    return value.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def add_norm_kernel(
    x: tl.tensor,
    added: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    stride: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    is_there = at < size
    v = read(x + row * stride, at, is_there)
    if ADDS:
        v = rounded(v + read(added + row * size, at, is_there), out)
        tl.store(x + row * stride + at, v.to(out.dtype.element_ty), mask=is_there)
    v = rounded(v * tl.rsqrt(tl.sum(v * v) / size + eps), out)
    tl.store(out + row * size + at, (v * read(weight, at, is_there)).to(out.dtype.element_ty), mask=is_there)


@triton.jit
def silu_and_mul_kernel(
    gate_up: tl.tensor, out: tl.tensor, stride: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = at < size
    gate = read(gate_up + row * stride, at, is_there)
    up = read(gate_up + row * stride + size, at, is_there)
    small = tl.exp(-tl.abs(gate))  # of no number is it too large
    opened = rounded(gate * tl.where(gate < 0, small, 1.0) / (1.0 + small), out)
    tl.store(out + row * size + at, (opened * up).to(out.dtype.element_ty), mask=is_there)


# A step's slots may lie anywhere: Triton would compile anew for places divisible by 16.
@triton.jit(do_not_specialize_on_alignment=["slots"])
def turn_and_store_kernel(
    qkv: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slots: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    eps: tl.tensor,
    stride: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    HAS_NORMS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A head's halves are turned against each other. The head is one of queries, then of keys, then of values."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = DIM // 2
    at = tl.arange(0, BLOCK)
    is_there = at < half
    own = qkv + token * stride + head * DIM
    first, second = read(own, at, is_there), read(own + half, at, is_there)
    if head < heads + kv_heads:
        if HAS_NORMS:
            scale = tl.rsqrt((tl.sum(first * first) + tl.sum(second * second)) / DIM + eps)
            weight = q_norm if head < heads else k_norm
            first = rounded(rounded(first * scale, q) * read(weight, at, is_there), q)
            second = rounded(rounded(second * scale, q) * read(weight + half, at, is_there), q)
        c, s = read(cos + token * half, at, is_there), read(sin + token * half, at, is_there)
        turned = rounded(first * c, q) - rounded(second * s, q)
        second = rounded(second * c, q) + rounded(first * s, q)
        first = turned
    if head < heads:
        write_halves(q + (token * heads + head) * DIM, at, is_there, first, second, half)
    else:
        slot = tl.load(slots + token)
        is_key = head < heads + kv_heads
        to = (keys if is_key else values) + (slot * kv_heads + head - heads - (0 if is_key else kv_heads)) * DIM
        write_halves(to, at, is_there & (slot >= 0), first, second, half)


@triton.jit
def write_halves(
    to: tl.tensor, at: tl.tensor, is_there: tl.tensor, first: tl.tensor, second: tl.tensor, half: tl.constexpr
) -> None:
    tl.store(to + at, first.to(to.dtype.element_ty), mask=is_there)
    tl.store(to + half + at, second.to(to.dtype.element_ty), mask=is_there)
