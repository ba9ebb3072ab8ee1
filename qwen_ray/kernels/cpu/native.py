"""The kernels in C++ behind the names of `reference.py`; see the `.cpp` files for what they do.

For one compute dtype, float32 or bfloat16, of all that they are given; x of another goes to the reference. So does what
torch does faster, with AMX: products of many rows of bfloat16. Apart from these a row's result depends on that row
alone, to the last bit: not on what is computed beside it, nor on the instruction set.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass
from itertools import accumulate

import torch

from qwen_ray.kernels import quantized, reference
from qwen_ray.kernels.cpu import experts
from qwen_ray.kernels.cpu.library import Library
from qwen_ray.kernels.cpu.parts import AttentionPart, ExpertsPart, Layer, Matrix, MlpPart, MoePart, Sequences, Step
from qwen_ray.kernels.layer import AttentionWeights, LayerWeights, MlpWeights, MoeWeights, Places
from qwen_ray.kernels.quantized import Matrices, PackedWeight

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
AMX_ROWS = 16  # about so many take torch with AMX as long as the products here (estimated from figures of both)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """As C++ has them, and what holds their memory."""

    array: ctypes.Array[Layer]
    weights: tuple[LayerWeights, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Of S sequences: where their rows of q begin and how many they are, their tokens, their blocks; all int64."""

    starts: torch.Tensor  # [S]
    counts: torch.Tensor  # [S]
    lengths: torch.Tensor  # [S]
    block_tables: torch.Tensor  # [S, max blocks]
    sequences: Sequences  # of these


class NativeKernels:
    """One library's functions as `Kernels` has them."""

    def __init__(self, library: Library, dtype: torch.dtype, *, with_amx: bool) -> None:
        """`dtype` is one of SUFFIXES; `with_amx`: products of many rows of bfloat16 are torch's."""
        suffix = SUFFIXES[dtype]
        self._dtype = dtype
        self._most_rows = AMX_ROWS if with_amx and dtype is torch.bfloat16 else None
        self.is_row_by_row = self._most_rows is None
        self._linear = library.function(f"linear_{suffix}", "pnppni")
        self._rms_norm = library.function(f"rms_norm_{suffix}", "pnpfpnnni", is_short=True)
        self._rotate = library.function(f"rotate_{suffix}", "pnpppnnni", is_short=True)
        self._silu_and_mul = library.function(f"silu_and_mul_{suffix}", "ppnni", is_short=True)
        self._run_experts = library.function(f"run_experts_{suffix}", "pnnpnpppi")
        self._attend = library.function(f"attend_{suffix}", "pnpppnnnfpi")
        self._attend_whole = library.function(f"attend_whole_{suffix}", "pnpppni")
        self._mlp = library.function(f"mlp_{suffix}", "pnppni")
        self._greatest = {dtype: library.function(f"greatest_{s}", "pnnppi") for dtype, s in SUFFIXES.items()}
        self._moe = library.function(f"moe_{suffix}", "pnpppni")
        self._route = library.function(f"route_{suffix}", "pnnnippi")
        self._run_layers = library.function(f"run_layers_{suffix}", "pnpppnni")

    def _room(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtype)  # twice as fast as x.new_empty, and called a hundred times a step

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As `reference.linear`."""
        return self._multiply(x, Matrix.of(weight, bias)) if self.takes(x) else reference.linear(x, weight, bias)

    def linear_packed(self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        """As `quantized.linear_packed`, with rows of x rounded as it says there."""
        if x.dtype is not self._dtype:
            return quantized.linear_packed(x, weight, bias)
        return self._multiply(x, Matrix.of(weight, bias))

    def takes(self, x: torch.Tensor) -> bool:
        """Whether products of x [T, n] with matrices that are not packed are computed here."""
        return x.dtype is self._dtype and (self._most_rows is None or x.shape[0] <= self._most_rows)

    def _multiply(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        x = rows_together(x)
        num_rows = x.shape[0]
        assert x.shape[1] == matrix.size, f"rows of {x.shape[1]} by rows of {matrix.size}"
        out = self._room(num_rows, matrix.out_size)
        self._linear(x.data_ptr(), x.stride(0), byref(matrix), out.data_ptr(), num_rows, torch.get_num_threads())
        return out

    def mlp(self, x: torch.Tensor, weights: MlpWeights) -> torch.Tensor:
        """As `LayerKernels.mlp`."""
        x, part = rows_together(x), MlpPart.of(weights)
        assert x.shape[1] == part.gate_up.size, f"rows of {x.shape[1]} by rows of {part.gate_up.size}"
        out = self._room(x.shape[0], part.down.out_size)
        self._mlp(x.data_ptr(), x.stride(0), byref(part), out.data_ptr(), x.shape[0], torch.get_num_threads())
        return out

    def moe(self, x: torch.Tensor, weights: MoeWeights, positions: torch.Tensor) -> torch.Tensor:
        """As `LayerKernels.moe`."""
        x, part = rows_together(x), MoePart.of(weights)
        assert x.shape[1] == part.router.size, f"rows of {x.shape[1]} by rows of {part.router.size}"
        assert positions.is_contiguous(), "numbers follow each other"
        out = self._room(*x.shape)
        given = x.data_ptr(), x.stride(0), byref(part), positions.data_ptr()
        self._moe(*given, out.data_ptr(), x.shape[0], torch.get_num_threads())
        return out

    def attention(self, x: torch.Tensor, weights: AttentionWeights, places: Places) -> torch.Tensor:
        """As `LayerKernels.attention`."""
        x, part, step = rows_together(x), AttentionPart.of(weights, self._dtype), Step.of(weights, places)
        assert x.shape[1] == part.qkv.size, f"rows of {x.shape[1]} by rows of {part.qkv.size}"
        out = self._room(step.num_passed, part.o.out_size)
        given = x.data_ptr(), x.stride(0), byref(part), byref(step)
        self._attend_whole(*given, out.data_ptr(), x.shape[0], torch.get_num_threads())
        return out

    def prepare_layers(self, layers: Sequence[LayerWeights]) -> Layers:
        """As `LayerKernels.prepare_layers`."""
        array = (Layer * len(layers))(*(Layer.of(layer, self._dtype) for layer in layers))
        return Layers(array=array, weights=tuple(layers))

    def layers(self, x: torch.Tensor, prepared: Layers, places: Places, last: Places) -> torch.Tensor:
        """As `LayerKernels.layers`."""
        assert x.is_contiguous(), "changed in place"
        attention = prepared.weights[0].attention
        step = Step.of(attention, places)
        own = step if last is places else Step.of(attention, last)
        given = prepared.array, len(prepared.array), byref(step), byref(own), x.data_ptr()
        self._run_layers(*given, *x.shape, torch.get_num_threads())
        return last.passed_on(x)

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

    def route(self, logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """As `reference.route`; of equals the first ones."""
        if logits.dtype is not self._dtype:
            return reference.route(logits, top_k, renormalize)
        logits = logits.contiguous()
        weights = torch.empty(len(logits), top_k)
        ids = torch.empty(len(logits), top_k, dtype=torch.int64)
        given = logits.data_ptr(), *logits.shape, top_k, renormalize, weights.data_ptr(), ids.data_ptr()
        self._route(*given, torch.get_num_threads())
        return weights, ids

    def greatest(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `reference.greatest`."""
        if logits.dtype not in self._greatest:
            return reference.greatest(logits)
        logits = logits.contiguous()
        ids, is_finite = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits), dtype=torch.bool)
        given = logits.data_ptr(), *logits.shape, ids.data_ptr(), is_finite.data_ptr()
        self._greatest[logits.dtype](*given, torch.get_num_threads())
        return ids, is_finite

    def run_experts(
        self,
        x: torch.Tensor,
        slots: torch.Tensor,
        weights: torch.Tensor,
        gate_up: Matrices,
        down: Matrices,
    ) -> torch.Tensor:
        """As `reference.run_experts`."""
        if x.dtype is not self._dtype:
            return experts.run_experts(x, slots, weights, gate_up, down)
        if not len(gate_up):
            return torch.zeros_like(x)
        x, part = rows_together(x), ExpertsPart.of(gate_up, down)
        slots, weights = slots.long().contiguous(), weights.float().contiguous()
        assert x.shape[1] == part.gate_up.first.size, f"rows of {x.shape[1]} by rows of {part.gate_up.first.size}"
        out = self._room(x.shape[0], part.down.first.out_size)
        given = x.data_ptr(), x.stride(0), len(slots), slots.data_ptr(), slots.shape[1], weights.data_ptr()
        self._run_experts(*given, byref(part), out.data_ptr(), torch.get_num_threads())
        return out

    def plan_attention(
        self,
        block_tables: torch.Tensor,
        query_lens: tuple[int, ...],
        context_lens: tuple[int, ...],
        block_size: int,
    ) -> AttentionPlan:
        """As `reference.plan_attention`."""
        starts = torch.tensor([0, *accumulate(query_lens)][:-1], dtype=torch.int64)
        counts, lengths = torch.tensor([query_lens, context_lens], dtype=torch.int64)
        tables = block_tables.long().contiguous()
        pointers = (tensor.data_ptr() for tensor in (starts, counts, lengths, tables))
        sequences = Sequences(*pointers, tables.shape[1], len(query_lens), block_size)
        return AttentionPlan(starts=starts, counts=counts, lengths=lengths, block_tables=tables, sequences=sequences)

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
            byref(plan.sequences),
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
