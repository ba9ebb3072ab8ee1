"""The kernels in C++ behind the names of `reference.py`; see the `.cpp` files for what they do.

For one compute dtype, float32 or bfloat16, of all that they are given; x of another goes to the reference. So does what
torch does faster, with AMX: products of many rows of bfloat16. Apart from these a row's result depends on that row
alone, to the last bit: not on what is computed beside it, nor on the instruction set.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from qwen_ray.kernels import quantized, reference
from qwen_ray.kernels.cpu import experts
from qwen_ray.kernels.cpu.library import Library
from qwen_ray.kernels.quantized import PackedWeight

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
AMX_ROWS = 16  # about so many take torch with AMX as long as the products here (estimated from figures of both)
PARTS_AT_ONCE = 16384  # rows of hidden states, one per token and choice: larger inputs are computed in pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Of S sequences: where their rows of q begin and how many they are, their tokens, their blocks; all int64."""

    starts: torch.Tensor  # [S]
    counts: torch.Tensor  # [S]
    lengths: torch.Tensor  # [S]
    block_tables: torch.Tensor  # [S, max blocks]
    block_size: int


class NativeKernels:
    """One library's functions as `Kernels` has them."""

    def __init__(self, library: Library, dtype: torch.dtype) -> None:
        """`dtype` is one of SUFFIXES."""
        suffix = SUFFIXES[dtype]
        self._dtype = dtype
        self._most_rows = AMX_ROWS if library.has_amx and dtype is torch.bfloat16 else None
        self._linear = library.function(f"linear_{suffix}", "pnpnppnnni")
        self._linear_packed = library.function(f"linear_packed_{suffix}", "pnpnppippnnni")
        self._rms_norm = library.function(f"rms_norm_{suffix}", "pnpfpnnni", is_short=True)
        self._rotate = library.function(f"rotate_{suffix}", "pnpppnnni", is_short=True)
        self._silu_and_mul = library.function(f"silu_and_mul_{suffix}", "ppnni", is_short=True)
        self._run_experts = library.function(f"run_experts_{suffix}", "pnnpnpppnnnpppi")
        self._attend = library.function(f"attend_{suffix}", "pnpppppp" + "nnnnnn" + "fpi")

    def _room(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtype)  # twice as fast as x.new_empty, and called a hundred times a step

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As `reference.linear`."""
        num_rows = x.shape[0]
        if x.dtype is not self._dtype or (self._most_rows is not None and num_rows > self._most_rows):
            return reference.linear(x, weight, bias)
        if x.stride(1) != 1:
            x = x.contiguous()
        out_size, size = weight.shape
        assert x.shape[1] == size, f"rows of {x.shape[1]} by rows of {size}"
        out = self._room(num_rows, out_size)
        self._linear(
            x.data_ptr(),
            x.stride(0),
            weight.data_ptr(),
            weight.stride(0),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            num_rows,
            out_size,
            size,
            torch.get_num_threads(),
        )
        return out

    def linear_packed(self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        """As `quantized.linear_packed`, with rows of x rounded to 16 bits, or beside 4-bit weights to 8."""
        if x.dtype is not self._dtype:
            return quantized.linear_packed(x, weight, bias)
        if x.stride(1) != 1:
            x = x.contiguous()
        num_rows, out_size = x.shape[0], weight.values.shape[0]
        out = self._room(num_rows, out_size)
        self._linear_packed(
            x.data_ptr(),
            x.stride(0),
            weight.values.data_ptr(),
            weight.values.shape[1],
            weight.scales.data_ptr(),
            None if weight.least is None else weight.least.data_ptr(),
            weight.group,
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            num_rows,
            out_size,
            weight.size,
            torch.get_num_threads(),
        )
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """As `reference.rms_norm`; x [T, hidden] or [T, heads, D]."""
        if x.dtype is not self._dtype:
            return reference.rms_norm(x, weight, eps)
        x = rows_together(x)
        out = self._room(*x.shape)
        num_tokens, size = x.shape[0], x.shape[-1]
        heads = x.shape[1] if x.ndim == 3 else 1
        threads = torch.get_num_threads()
        self._rms_norm(
            x.data_ptr(), x.stride(0), weight.data_ptr(), eps, out.data_ptr(), num_tokens, heads, size, threads
        )
        return out

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `reference.rotate`."""
        if q.dtype is not self._dtype:
            return reference.rotate(q, k, cos, sin)
        cos, sin = cos.contiguous(), sin.contiguous()
        angles = cos.data_ptr(), sin.data_ptr()
        threads = torch.get_num_threads()
        rotated: list[torch.Tensor] = []
        for x in (rows_together(q), rows_together(k)):
            out = self._room(*x.shape)
            self._rotate(x.data_ptr(), x.stride(0), *angles, out.data_ptr(), *x.shape, threads)
            rotated.append(out)
        return rotated[0], rotated[1]

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """As `reference.silu_and_mul`."""
        if gate_up.dtype is not self._dtype:
            return reference.silu_and_mul(gate_up)
        gate_up = gate_up.contiguous()
        num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = self._room(num_tokens, size)
        self._silu_and_mul(gate_up.data_ptr(), out.data_ptr(), num_tokens, size, torch.get_num_threads())
        return out

    def run_experts(
        self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        """As `reference.run_experts`."""
        if x.dtype is not self._dtype:
            return experts.run_experts(x, slots, weights, gate_up, down)
        if x.stride(1) != 1:
            x = x.contiguous()
        num_tokens, top_k = slots.shape
        slots, weights = slots.long().contiguous(), weights.float().contiguous()
        num_slots, hidden, inner = down.shape
        out = self._room(num_tokens, hidden)
        step = max(1, PARTS_AT_ONCE // top_k)
        num_parts = min(step, num_tokens) * top_k
        middle, parts = self._room(num_parts, inner), self._room(num_parts, hidden)
        for start in range(0, num_tokens, step):
            self._run_experts(
                x[start:].data_ptr(),
                x.stride(0),
                min(step, num_tokens - start),
                slots[start:].data_ptr(),
                top_k,
                weights[start:].data_ptr(),
                gate_up.data_ptr(),
                down.data_ptr(),
                num_slots,
                inner,
                hidden,
                middle.data_ptr(),
                parts.data_ptr(),
                out[start:].data_ptr(),
                torch.get_num_threads(),
            )
        return out

    def plan_attention(
        self,
        block_tables: torch.Tensor,
        query_lens: tuple[int, ...],
        context_lens: tuple[int, ...],
        block_size: int,
    ) -> AttentionPlan:
        """As `reference.plan_attention`."""
        return AttentionPlan(
            starts=torch.tensor([0, *accumulate(query_lens)][:-1], dtype=torch.int64),
            counts=torch.tensor(query_lens, dtype=torch.int64),
            lengths=torch.tensor(context_lens, dtype=torch.int64),
            block_tables=block_tables.long().contiguous(),
            block_size=block_size,
        )

    def paged_attention(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, scale: float
    ) -> torch.Tensor:
        """As `reference.paged_attention`."""
        assert q.dtype is k_cache.dtype is self._dtype, f"{q.dtype}, {k_cache.dtype}; expected {self._dtype}"
        q = rows_together(q)
        out = self._room(*q.shape)
        _, heads, dim = q.shape
        self._attend(
            q.data_ptr(),
            q.stride(0),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            plan.starts.data_ptr(),
            plan.counts.data_ptr(),
            plan.lengths.data_ptr(),
            plan.block_tables.data_ptr(),
            plan.block_tables.shape[1],
            plan.starts.shape[0],
            plan.block_size,
            heads,
            k_cache.shape[2],
            dim,
            scale,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


def rows_together(x: torch.Tensor) -> torch.Tensor:
    """x [T, n] or [T, heads, D], copied unless the elements of each x[t] lie one after the other."""
    if x.is_contiguous() or (x.stride(-1) == 1 and (x.ndim == 2 or x.stride(1) == x.shape[2])):
        return x
    return x.contiguous()
