"""What stands between products on CUDA, each in one pass over memory, in Triton.

Computes in float32, and rounds where `reference.py` rounds.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# Kernels say what their parameters are to Triton; they are called with tensors of torch, and with warps.

from __future__ import annotations

import torch
import triton

from qwen_ray.kernels.cuda.pointwise_kernels import add_norm_kernel, silu_and_mul_kernel, turn_and_store_kernel

SILU_BLOCK = 1024  # elements of a row that a program has


def add_norm(x: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, hidden] becomes x + `added`; returns its norm, as `reference.rms_norm` gives it.

    Elements of a row follow each other in x, rows in `added`, too.
    """
    num_rows, size = x.shape
    out = torch.empty(num_rows, size, dtype=x.dtype, device=x.device)
    if out.numel():
        block = triton.next_power_of_2(size)
        given = x, x if added is None else added, weight, out, x.stride(0), size, eps
        num_warps = min(max(block // 512, 1), 16)
        add_norm_kernel[(num_rows,)](*given, ADDS=added is not None, BLOCK=block, num_warps=num_warps)
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `reference.rms_norm`; x [T, hidden] or [T, heads, D]."""
    return add_norm(x.reshape(-1, x.shape[-1]), None, weight, eps).view(x.shape)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As `reference.silu_and_mul`."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        grid = num_rows, triton.cdiv(size, SILU_BLOCK)
        silu_and_mul_kernel[grid](gate_up, out, gate_up.stride(0), size, BLOCK=SILU_BLOCK, num_warps=4)
    return out


def turn_and_store(
    qkv: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    kv_cache: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Norms of q and k, `reference.rotate` and `reference.store_kv` in one: qkv [T, (heads + 2 KV heads) D] to q [T,
    heads, D].

    cos and sin [T, D / 2] and the caches are contiguous. Nothing is stored of a token whose slot is negative.
    """
    keys, values = kv_cache
    kv_heads, dim = keys.shape[2:]
    num_tokens, num_heads = qkv.shape[0], qkv.shape[1] // dim
    heads = num_heads - 2 * kv_heads
    q = torch.empty(num_tokens, heads, dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens and num_heads:
        weights = (slots, slots) if norms is None else norms
        given = qkv, q, keys, values, cos, sin, slots, *weights, eps, qkv.stride(0), heads, kv_heads
        block = triton.next_power_of_2(dim // 2)
        turn_and_store_kernel[(num_tokens, num_heads)](
            *given, HAS_NORMS=norms is not None, DIM=dim, BLOCK=block, num_warps=1
        )
    return q
