"""Routing and experts: the reference against the definition, the kernels of each device against the reference."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.kernels import reference
from qwen_ray.kernels.cpu import experts as cpu
from qwen_ray.kernels.cuda import experts as cuda

RunExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
ABSENT = st.sampled_from([0.0, 0.6, 1.0])
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(num_tokens: int, num_slots: int, top_k: int, absent: float, dtype: torch.dtype = torch.float32) -> Inputs:
    """Random tokens and experts; about `absent` of the choices are not here."""
    generator = torch.Generator().manual_seed(num_tokens * 100 + num_slots)
    hidden, inner = 16, 24
    x = torch.randn(num_tokens, hidden, generator=generator)
    scores = torch.rand(num_tokens, num_slots, generator=generator)
    slots = scores.topk(top_k).indices
    slots = torch.where(torch.rand(num_tokens, top_k, generator=generator) < absent, -1, slots)
    weights = torch.rand(num_tokens, top_k, generator=generator)
    gate_up = torch.randn(num_slots, 2 * inner, hidden, generator=generator) * 0.3
    down = torch.randn(num_slots, hidden, inner, generator=generator) * 0.3
    return x.to(dtype), slots, weights, gate_up.to(dtype), down.to(dtype)


def defined(
    x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Token by token, choice by choice."""
    out = torch.zeros_like(x)
    for n, own in enumerate(slots.tolist()):
        for choice, slot in enumerate(own):
            if slot >= 0:
                gate, up = (gate_up[slot] @ x[n]).chunk(2)
                out[n] += weights[n, choice] * (down[slot] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("run_experts", [reference.run_experts, cpu.run_experts], ids=["reference", "cpu"])
@given(num_tokens=st.integers(0, 9), num_slots=st.integers(1, 7), top_k=st.integers(1, 4), absent=ABSENT)
@settings(max_examples=25, deadline=None)
def test_experts_are_summed_as_defined(
    run_experts: RunExperts, num_tokens: int, num_slots: int, top_k: int, absent: float
) -> None:
    case = inputs(num_tokens, num_slots, min(top_k, num_slots), absent)
    torch.testing.assert_close(run_experts(*case), defined(*case), atol=1e-5, rtol=1e-5)


@given(num_tokens=st.integers(0, 9), num_slots=st.integers(1, 7), top_k=st.integers(1, 4), absent=ABSENT)
@settings(max_examples=25, deadline=None)
def test_the_grouped_product_equals_the_reference(num_tokens: int, num_slots: int, top_k: int, absent: float) -> None:
    """torch computes it on a CPU too."""
    case = inputs(num_tokens, num_slots, min(top_k, num_slots), absent, torch.bfloat16)
    torch.testing.assert_close(cuda.run_experts(*case), reference.run_experts(*case), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("run_experts", [reference.run_experts, cpu.run_experts, cuda.run_experts])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_slots_of_any_integer_type(run_experts: RunExperts, num_tokens: int) -> None:
    x, slots, weights, gate_up, down = inputs(num_tokens, 3, 2, 0.3, torch.bfloat16)
    got = run_experts(x, slots.int(), weights, gate_up, down)
    assert torch.equal(got, run_experts(x, slots, weights, gate_up, down))


def test_what_the_grouped_product_does_not_know_goes_to_the_reference() -> None:
    for case in (inputs(5, 3, 2, 0.3), inputs(5, 3, 2, 0.3, torch.float64)):
        assert torch.equal(cuda.run_experts(*case), reference.run_experts(*case))
    x, slots, weights, gate_up, down = inputs(5, 3, 2, 0.3, torch.bfloat16)
    odd = (x, slots, weights, gate_up[:, 1:-1], down[:, :, 1:])  # rows of 23 values
    assert torch.equal(cuda.run_experts(*odd), reference.run_experts(*odd))


@pytest.mark.parametrize("module", [cpu, cuda], ids=["cpu", "cuda"])
def test_large_inputs_are_computed_in_pieces(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARTS_AT_ONCE", 8)
    case = inputs(23, 5, 3, 0.3, torch.bfloat16)
    got = module.run_experts(*case)
    torch.testing.assert_close(got, reference.run_experts(*case), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("run_experts", [reference.run_experts, cpu.run_experts], ids=["reference", "cpu"])
def test_experts_without_tokens_are_not_touched(run_experts: RunExperts) -> None:
    x, slots, weights, gate_up, down = inputs(6, 5, 2, 0.0)
    slots = slots % 2 * 4  # slots 0 and 4 only
    slots[:, 1] = 4 - slots[:, 0]
    gate_up[1:4], down[1:4] = float("nan"), float("nan")
    assert run_experts(x, slots, weights, gate_up, down).isfinite().all()


@pytest.mark.parametrize("run_experts", [reference.run_experts, cpu.run_experts], ids=["reference", "cpu"])
def test_a_token_of_nan_spoils_no_other(run_experts: RunExperts) -> None:
    case = inputs(6, 3, 2, 0.0)
    expected = run_experts(*case)
    case[0][2] = float("nan")
    got = run_experts(*case)
    others = [0, 1, 3, 4, 5]
    assert got[2].isnan().all()
    torch.testing.assert_close(got[others], expected[others], atol=1e-6, rtol=1e-5)


def test_sums_run_in_float32_and_in_the_order_of_choice() -> None:
    parts = torch.tensor([[[256.0], [1.0], [-256.0]]], dtype=torch.bfloat16)  # 256 + 1 is no bfloat16
    assert reference.sum_choices(parts, torch.ones(1, 3)).item() == 1.0
    large = torch.tensor([[[1e8], [-1e8], [1.0]], [[1e8], [1.0], [-1e8]]])  # nor is 1e8 + 1 a float32
    assert reference.sum_choices(large, torch.ones(2, 3)).flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("renormalize", [True, False])
def test_routing_is_a_softmax_over_all_experts(renormalize: bool) -> None:
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights, ids = reference.route(logits, 3, renormalize)
    expected = torch.softmax(logits.float(), -1).gather(1, ids)
    assert weights.dtype is torch.float32
    assert ids.tolist() == logits.float().argsort(descending=True, stable=True)[:, :3].tolist()
    torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True) if renormalize else expected)
