"""Experts on an NVIDIA GPU give what the reference gives on a CPU. Only run where there is a GPU (see the Makefile)."""

from __future__ import annotations

import pytest
import torch

from qwen_ray.kernels import reference
from qwen_ray.kernels.registry import Kernels

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("hidden", "inner"), [(256, 128), (250, 125)])  # the latter is none for the grouped product
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 5000])
def test_experts_equal_the_reference(num_tokens: int, hidden: int, inner: int, dtype: torch.dtype) -> None:
    num_slots, top_k = 12, 4
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    logits = torch.randn(num_tokens, num_slots, generator=generator).to(dtype)
    gate_up = (torch.randn(num_slots, 2 * inner, hidden, generator=generator) / hidden**0.5).to(dtype)
    down = (torch.randn(num_slots, hidden, inner, generator=generator) / inner**0.5).to(dtype)
    weights, ids = reference.route(logits, top_k, True)
    slots = torch.where(ids % 3 == 0, -1, ids)  # on other ranks
    slots[slots == 5] = -1  # one expert without tokens
    kernels = Kernels.of(torch.device("cuda"), torch.bfloat16)
    found_weights, found_ids = kernels.route(logits.cuda(), top_k, True)
    torch.testing.assert_close(found_weights.cpu(), weights, atol=1e-5, rtol=1e-4)
    assert found_ids.shape == ids.shape
    found = kernels.run_experts(x.cuda(), slots.cuda(), weights.cuda(), gate_up.cuda(), down.cuda()).cpu()
    expected = reference.run_experts(x.float(), slots, weights, gate_up.float(), down.float()).to(dtype)
    tolerance = 1e-3 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_a_decode_makes_the_host_wait_for_nothing() -> None:
    """On Hopper and later; before, torch's grouped product goes group by group."""
    assert torch.cuda.get_device_capability() >= (9, 0)
    x = torch.randn(3, 256, device="cuda", dtype=torch.bfloat16)
    gate_up = torch.randn(8, 256, 256, device="cuda", dtype=torch.bfloat16)
    down = torch.randn(8, 256, 128, device="cuda", dtype=torch.bfloat16)
    kernels = Kernels.of(torch.device("cuda"), torch.bfloat16)
    weights, ids = kernels.route(torch.randn(3, 8, device="cuda"), 2, True)
    kernels.run_experts(x, ids, weights, gate_up, down)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.run_experts(x, ids, weights, gate_up, down)
    finally:
        torch.cuda.set_sync_debug_mode("default")
