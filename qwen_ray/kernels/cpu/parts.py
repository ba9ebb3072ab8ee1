"""What the kernels in C++ are given, as they have it themselves: pointers and sizes.

Each is valid as long as the tensors live that it is made of; whoever makes one holds them.
"""

from __future__ import annotations

import ctypes
from ctypes import pointer

import torch

from qwen_ray.kernels.layer import AttentionWeights, LayerWeights, MlpWeights, MoeWeights, Places
from qwen_ray.kernels.quantized import Matrices, PackedStack, PackedWeight


class Matrix(ctypes.Structure):
    """`team.h` has the same: a matrix as it is or packed, and the bias of its products."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("least", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out_size", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
    )

    @classmethod
    def of(cls, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None = None) -> Matrix:
        add = None if bias is None else bias.data_ptr()
        if isinstance(weight, torch.Tensor):
            row_bytes = weight.stride(0) * weight.element_size()
            return cls(weight.data_ptr(), row_bytes, None, None, add, *weight.shape, 0, 0)
        least = None if weight.least is None else weight.least.data_ptr()
        sizes = weight.out_size, weight.size, weight.bits, weight.group
        return cls(weight.values.data_ptr(), weight.row_bytes, weight.scales.data_ptr(), least, add, *sizes)


class Stack(ctypes.Structure):
    """`team.h` has the same."""

    _fields_ = (("first", Matrix), ("count", ctypes.c_int64))

    @classmethod
    def of(cls, matrices: Matrices) -> Stack:
        assert isinstance(matrices, PackedStack) or matrices.is_contiguous(), "one matrix after the other"
        return cls(Matrix.of(matrices[0]), len(matrices))


class ExpertsPart(ctypes.Structure):
    """`experts.h` has the same."""

    _fields_ = (("gate_up", Stack), ("down", Stack))

    @classmethod
    def of(cls, gate_up: Matrices, down: Matrices) -> ExpertsPart:
        part = cls(Stack.of(gate_up), Stack.of(down))
        gates, rest = part.gate_up.first, part.down.first
        assert gates.out_size == 2 * rest.size, f"{gates.out_size} gates and others for rows of {rest.size}"
        assert part.gate_up.count == part.down.count, f"{part.gate_up.count} and {part.down.count} matrices"
        return part


class Sequences(ctypes.Structure):
    """`attention.h` has the same; see AttentionPlan."""

    _fields_ = (
        ("starts", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("table_width", ctypes.c_int64),
        ("num_sequences", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
    )


class Step(ctypes.Structure):
    """`layers.cpp` has the same, as it has those that follow."""

    _fields_ = (
        ("sequences", Sequences),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("num_passed", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
    )

    @classmethod
    def of(cls, weights: AttentionWeights, places: Places) -> Step:
        kv_heads, dim = weights.kv_cache[0].shape[2:]
        tables = places.cos, places.sin, places.slots, places.positions
        assert all(table.is_contiguous() for table in tables), "their rows follow each other"
        *pointers, positions = (table.data_ptr() for table in tables)
        rows = None if places.rows is None else places.rows.data_ptr()
        passed_on = rows, positions, len(places.positions)
        sequences = Sequences() if places.plan is None else places.plan.sequences
        heads = (weights.o.shape[1] if isinstance(weights.o, torch.Tensor) else weights.o.size) // dim
        return cls(sequences, *pointers, *passed_on, heads, kv_heads, dim, weights.scale, weights.eps)


class AttentionPart(ctypes.Structure):
    """See AttentionWeights."""

    _fields_ = (
        ("qkv", Matrix),
        ("o", Matrix),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    )

    @classmethod
    def of(cls, weights: AttentionWeights, dtype: torch.dtype) -> AttentionPart:
        keys, values = weights.kv_cache
        qkv, o = Matrix.of(weights.qkv, weights.bias), Matrix.of(weights.o)
        kv_heads, dim = keys.shape[2:]
        assert keys.dtype is dtype, f"{keys.dtype}; expected {dtype}"
        assert qkv.out_size == o.size + 2 * kv_heads * dim, f"{qkv.out_size} for {o.size} and {kv_heads} heads of {dim}"
        norms = (None, None) if weights.norms is None else (norm.data_ptr() for norm in weights.norms)
        return cls(qkv, o, *norms, keys.data_ptr(), values.data_ptr())


class MlpPart(ctypes.Structure):
    """See MlpWeights."""

    _fields_ = (("gate_up", Matrix), ("down", Matrix))

    @classmethod
    def of(cls, weights: MlpWeights) -> MlpPart:
        gate_up, down = Matrix.of(weights.gate_up), Matrix.of(weights.down)
        assert gate_up.out_size == 2 * down.size, f"{gate_up.out_size} gates and others for rows of {down.size}"
        return cls(gate_up, down)


class MoePart(ctypes.Structure):
    """See MoeWeights."""

    _fields_ = (
        ("router", Matrix),
        ("experts", ExpertsPart),
        ("places", ctypes.c_void_p),
        ("num_copies", ctypes.c_void_p),
        ("most_copies", ctypes.c_int64),
        ("first_place", ctypes.c_int64),
        ("ids", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("top_k", ctypes.c_int64),
        ("renormalizes", ctypes.c_int64),
        ("shared", ctypes.POINTER(MlpPart)),
        ("shared_gate", Matrix),
    )

    @classmethod
    def of(cls, weights: MoeWeights) -> MoePart:
        experts = weights.experts
        part = cls(router=Matrix.of(weights.router), experts=ExpertsPart.of(experts.gate_up, experts.down))
        tables = {name: getattr(experts, name) for name in ("places", "num_copies", "ids", "tokens")}
        for name, table in tables.items():
            assert table.is_contiguous(), f"{name}: numbers follow each other"
            assert table.dtype is torch.int64, f"{name}: {table.dtype}"
            setattr(part, name, table.data_ptr())
        assert len(experts.ids) >= part.experts.down.count, f"{len(experts.ids)} ids"
        part.most_copies, part.first_place = experts.places.shape[1], experts.first_place
        part.top_k, part.renormalizes = weights.top_k, weights.renormalize
        if weights.shared is not None:
            mlp, gate = weights.shared
            part.shared, part.shared_gate = pointer(MlpPart.of(mlp)), Matrix.of(gate)
        return part


class Layer(ctypes.Structure):
    """See LayerWeights."""

    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("attention", AttentionPart),
        ("mlp_norm", ctypes.c_void_p),
        ("mlp", MlpPart),
        ("moe", ctypes.POINTER(MoePart)),
    )

    @classmethod
    def of(cls, weights: LayerWeights, dtype: torch.dtype) -> Layer:
        layer = cls(
            attention_norm=weights.attention_norm.data_ptr(),
            attention=AttentionPart.of(weights.attention, dtype),
            mlp_norm=weights.mlp_norm.data_ptr(),
        )
        if isinstance(weights.mlp, MlpWeights):
            layer.mlp = MlpPart.of(weights.mlp)
        else:
            layer.moe = pointer(MoePart.of(weights.mlp))
        return layer
