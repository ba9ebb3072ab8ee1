"""Which kernels a device gets: decided once, at start, and handed to the layers.

Knows devices. Everything behind a name here does exactly what `reference.py` says under the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from qwen_ray.kernels import quantized, reference
from qwen_ray.kernels.layer import AttentionWeights, LayerWeights, MlpWeights, MoeWeights, Places
from qwen_ray.kernels.quantized import Matrices, PackedWeight

if TYPE_CHECKING:
    from qwen_ray.kernels.cpu.library import Library


class LayerKernels(Protocol):
    """Layers at once, or parts of one: what stands between kernels costs more than they do, where x has few rows.

    To the last bit what the single kernels give. Of parts, results are this rank's part of the sum over tensor ranks.
    """

    def takes(self, x: torch.Tensor) -> bool:
        """Whether these are for x [T, hidden]; if not, the single kernels are."""
        ...

    def mlp(self, x: torch.Tensor, weights: MlpWeights) -> torch.Tensor:
        """[T, hidden] to [T, hidden]."""
        ...

    def moe(self, x: torch.Tensor, weights: MoeWeights, positions: torch.Tensor) -> torch.Tensor:
        """[T, hidden] to [T, hidden], of tokens at `positions` [T] of their sequences. Counts tokens of experts."""
        ...

    def attention(self, x: torch.Tensor, weights: AttentionWeights, places: Places) -> torch.Tensor:
        """[T, hidden] to [R, hidden], see `Places`. Stores keys and values."""
        ...

    def prepare_layers(self, layers: Sequence[LayerWeights]) -> Any:
        """Layers that follow each other, for `layers`; all of one kind have the same sizes. Holds their tensors."""
        ...

    def layers(self, x: torch.Tensor, prepared: Any, places: Places, last: Places) -> torch.Tensor:
        """[T, hidden], contiguous, which may be changed, to [R, hidden]: nothing is added up over ranks in between.

        `last` are the places of the last of the layers. Stores keys and values.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The operations of one device; see `reference.py`, and `quantized.py`, for what each takes and gives.

    A plan of `plan_attention` is for `paged_attention` of the same kernels alone, and so is one of `plan_decodes`
    (block_tables [S, max blocks], longest context, block size): of one query for each of S sequences. Its `lens` [S]
    int32 are their contexts, which like the tables may be overwritten between runs; 0 is nobody's, who gets zeros.
    """

    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    linear_packed: Callable[[torch.Tensor, PackedWeight, torch.Tensor | None], torch.Tensor]
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    silu_and_mul: Callable[[torch.Tensor], torch.Tensor]
    route: Callable[[torch.Tensor, int, bool], tuple[torch.Tensor, torch.Tensor]]
    run_experts: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Matrices, Matrices], torch.Tensor]
    store_kv: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
    plan_attention: Callable[[torch.Tensor, tuple[int, ...], tuple[int, ...], int], Any]
    paged_attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any, float], torch.Tensor]
    greatest: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    of_layers: LayerKernels | None = None
    plan_decodes: Callable[[torch.Tensor, int, int], Any] | None = None  # None: no steps as CUDA graphs
    is_row_by_row: bool = False  # what a row gives does not depend on others, to the last bit

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, *, deterministic: bool = False) -> Kernels:
        """The fastest that `device` has for layers that compute in `dtype`.

        `deterministic`: of those of which a row's bits depend on that row alone, if there are any (`is_row_by_row`).
        """
        if device.type == "cpu":
            from qwen_ray.kernels.cpu import library

            return cls.on_cpu(library.load(), dtype, deterministic=deterministic)
        if device.type == "cuda" and find_spec("triton") and torch.cuda.get_device_capability(device) >= (8, 0):
            return cls.on_cuda(dtype, deterministic=deterministic)
        return REFERENCE

    @classmethod
    def on_cuda(cls, dtype: torch.dtype, *, deterministic: bool = False) -> Kernels:
        """Those in Triton, which also run without a GPU where Triton interprets them."""
        from qwen_ray.kernels.cuda import attention, experts, layers, matmul, packed, packed_experts, pointwise

        has_grouped = hasattr(F, "grouped_mm") and dtype in experts.DTYPES
        products = layers.Products(
            linear=matmul.linear if deterministic else reference.linear,
            linear_packed=matmul.linear_packed if deterministic else packed.linear_packed,
            run_experts=packed_experts.run_experts if has_grouped and not deterministic else matmul.run_experts,
        )
        return replace(
            REFERENCE,
            linear=products.linear,
            linear_packed=products.linear_packed,
            rms_norm=pointwise.rms_norm,
            silu_and_mul=pointwise.silu_and_mul,
            run_experts=products.run_experts,
            plan_attention=partial(attention.plan_attention, has_decodes=not deterministic),
            plan_decodes=partial(attention.decode_plan, has_decodes=not deterministic),
            paged_attention=attention.paged_attention,
            of_layers=layers.CudaLayers(dtype, products),
            is_row_by_row=deterministic,
        )

    @classmethod
    def on_cpu(cls, library: Library | None, dtype: torch.dtype, *, deterministic: bool = False) -> Kernels:
        """Those in C++ where there is a library and it knows `dtype`, else the fastest that torch has."""
        from qwen_ray.kernels.cpu import attention, experts, native

        if library is None or dtype not in native.SUFFIXES:
            return replace(
                REFERENCE,
                plan_attention=attention.plan_attention,
                paged_attention=attention.paged_attention,
                run_experts=experts.run_experts,
            )
        own = native.NativeKernels(library, dtype, with_amx=library.has_amx and not deterministic)
        return replace(
            REFERENCE,
            linear=own.linear,
            linear_packed=own.linear_packed,
            rms_norm=own.rms_norm,
            rotate=own.rotate,
            silu_and_mul=own.silu_and_mul,
            route=own.route,
            run_experts=own.run_experts,
            plan_attention=own.plan_attention,
            paged_attention=own.paged_attention,
            greatest=own.greatest,
            of_layers=own,
            is_row_by_row=own.is_row_by_row,
        )


REFERENCE = Kernels(
    linear=reference.linear,
    linear_packed=quantized.linear_packed,
    rms_norm=reference.rms_norm,
    rotate=reference.rotate,
    silu_and_mul=reference.silu_and_mul,
    route=reference.route,
    run_experts=reference.run_experts,
    store_kv=reference.store_kv,
    plan_attention=reference.plan_attention,
    paged_attention=reference.paged_attention,
    greatest=reference.greatest,
)
