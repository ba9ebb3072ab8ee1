"""The kernels in C++, each instruction set that this machine has, against the reference: odd sizes, and row for row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.kernels import reference
from qwen_ray.kernels.cpu.library import VARIANTS, Library, open_library, processor_flags
from qwen_ray.kernels.registry import Kernels

LIBRARIES = [library for v in VARIANTS if v.needs <= processor_flags() and (library := open_library(v))]
CASES = [
    pytest.param(library, dtype, id=f"{library.name if library else 'torch'}-{dtype}")
    for library in (None, *LIBRARIES)
    for dtype in (torch.float32, torch.bfloat16)
]
cases = pytest.mark.parametrize(("library", "dtype"), CASES)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=TOLERANCE[got.dtype], rtol=TOLERANCE[got.dtype])


@cases
@given(
    num_rows=st.one_of(st.integers(0, 20), st.integers(110, 150), st.integers(510, 550)),  # few, many, two parts
    size=st.one_of(st.integers(0, 300), st.integers(2000, 4500)),  # none where more ranks share a row than it has
    out_size=st.integers(1, 150),
    has_bias=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_linear(
    library: Library | None, dtype: torch.dtype, num_rows: int, size: int, out_size: int, has_bias: bool
) -> None:
    linear = Kernels.on_cpu(library, dtype).linear
    x, w = random(num_rows, size, dtype=dtype), random(out_size, size, dtype=dtype) / max(size, 1) ** 0.5
    bias = random(out_size, dtype=dtype) if has_bias else None
    got = linear(x, w, bias)
    close(got, reference.linear(x.float(), w.float(), None if bias is None else bias.float()).to(dtype))
    if library is not None:  # torch does not promise it
        for i in {*range(min(num_rows, 20)), *range(num_rows)[-20:]}:
            assert torch.equal(linear(x[i : i + 1], w, bias)[0], got[i])


@cases
def test_linear_takes_rows_and_columns_of_larger_tensors(library: Library | None, dtype: torch.dtype) -> None:
    linear = Kernels.on_cpu(library, dtype).linear
    x, w = random(9, 80, dtype=dtype), random(30, 90, dtype=dtype)
    close(linear(x[2:7, 3:43], w[:, :40], None), reference.linear(x[2:7, 3:43], w[:, :40], None))
    close(linear(x.t()[:40], w[:, :9], None), reference.linear(x.t()[:40], w[:, :9], None))


@cases
def test_every_instruction_set_gives_the_same_bits(library: Library | None, dtype: torch.dtype) -> None:
    """Sums run in one order: a request may go on on another machine."""
    for num_rows in (7, 150):
        x, w = random(num_rows, 333, dtype=dtype), random(65, 333, dtype=dtype)
        of_all = [Kernels.on_cpu(other, dtype).linear(x, w, None) for other in (LIBRARIES if library else [None])]
        assert torch.equal(Kernels.on_cpu(library, dtype).linear(x, w, None), of_all[0])


@pytest.mark.parametrize(("library", "dtype"), [case for case in CASES if case.values[0] is not None])
@given(
    length=st.integers(1, 1200), part=st.floats(0, 1), heads=st.sampled_from([(7, 1), (4, 2)]), dim=st.integers(1, 80)
)
@settings(max_examples=6, deadline=None)
def test_a_token_of_a_prompt_is_attended_to_as_if_it_came_alone(
    library: Library, dtype: torch.dtype, length: int, part: float, heads: tuple[int, int], dim: int
) -> None:
    """However a prompt is cut into chunks: so a sequence may be computed again from all of its tokens."""
    kernels = Kernels.on_cpu(library, dtype)
    count, num_blocks = max(1, round(part * length)), -(-length // 16)
    q = random(count, heads[0], dim, dtype=dtype)
    k, v = (random(num_blocks, 16, heads[1], dim, dtype=dtype, seed=i) for i in range(2))
    table = torch.randperm(num_blocks)[None]

    def attend(first: int, end: int) -> torch.Tensor:
        plan = kernels.plan_attention(table, (end - first,), (length - count + end,), 16)
        return kernels.paged_attention(q[first:end], k, v, plan, dim**-0.5)

    whole = attend(0, count)
    for i in {0, count // 3, count - 1}:
        assert torch.equal(attend(i, i + 1)[0], whole[i])
    assert torch.equal(attend(count // 2, count), whole[count // 2 :])
    close(
        whole, reference.paged_attention(q, k, v, reference.plan_attention(table, (count,), (length,), 16), dim**-0.5)
    )


@cases
@given(num_tokens=st.integers(0, 9), heads=st.integers(1, 5), size=st.integers(1, 70).map(lambda n: 2 * n))
@settings(max_examples=8, deadline=None)
def test_norm_rotation_and_gate(
    library: Library | None, dtype: torch.dtype, num_tokens: int, heads: int, size: int
) -> None:
    kernels = Kernels.on_cpu(library, dtype)
    qkv = random(num_tokens, heads + 2, size, dtype=dtype)
    q, k, _ = qkv.split((heads, 1, 1), dim=1)  # strided, as attention gives them
    weight, cos, sin = (
        random(*shape, dtype=dtype) for shape in ((size,), (num_tokens, size // 2), (num_tokens, size // 2))
    )
    close(kernels.rms_norm(q, weight, 1e-6), reference.rms_norm(q, weight, 1e-6))
    close(kernels.rms_norm(q[:, 0], weight, 1e-6), reference.rms_norm(q[:, 0], weight, 1e-6))
    for got, expected in zip(kernels.rotate(q, k, cos, sin), reference.rotate(q, k, cos, sin), strict=True):
        close(got, expected)
    close(kernels.silu_and_mul(qkv[:, 0] * 5), reference.silu_and_mul(qkv[:, 0] * 5))


@cases
def test_extremes_come_out_as_they_must(library: Library | None, dtype: torch.dtype) -> None:
    """NaN is never lost: a step that is spoilt has to be seen."""
    kernels = Kernels.on_cpu(library, dtype)
    gate = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 1e30, float("nan")]], dtype=dtype)
    ones = torch.ones_like(gate)
    got = kernels.silu_and_mul(torch.cat((gate, ones), 1))
    close(got[:, :6], reference.silu_and_mul(torch.cat((gate, ones), 1))[:, :6])
    assert got[0, 6].isnan()
    x = torch.full((2, 40), 1.0, dtype=dtype)
    x[1, 3] = float("nan")
    out = kernels.linear(x, torch.ones(5, 40, dtype=dtype), None)
    assert out[1].isnan().all()
    assert (out[0] == 40).all()


@cases
@given(
    vocab_size=st.integers(1, 700),
    num_rows=st.integers(0, 4),
    num_values=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_the_greatest_is_the_first_of_equals(
    library: Library | None, dtype: torch.dtype, vocab_size: int, num_rows: int, num_values: int, seed: int
) -> None:
    greatest = Kernels.on_cpu(library, dtype).greatest
    dice = torch.Generator().manual_seed(seed)
    logits = torch.randint(num_values, (num_rows, vocab_size), generator=dice).float().log().to(dtype)  # -inf, too
    expected = [row.tolist().index(row.max().item()) for row in logits]
    places, is_finite = greatest(logits)
    assert places.tolist() == expected
    assert torch.equal(is_finite, logits.isfinite().all(-1))
    for spoilt in (float("nan"), float("inf")):
        logits = torch.zeros(2, vocab_size, dtype=dtype)
        logits[1, seed % vocab_size] = spoilt
        assert greatest(logits)[1].tolist() == [True, False]


@cases
@given(num_tokens=st.integers(0, 9), num_experts=st.integers(1, 70), top_k=st.integers(1, 9))
@settings(max_examples=8, deadline=None)
def test_route(library: Library | None, dtype: torch.dtype, num_tokens: int, num_experts: int, top_k: int) -> None:
    route = Kernels.on_cpu(library, dtype).route
    top_k = min(top_k, num_experts)
    logits = torch.stack(
        [random(num_experts, dtype=torch.float32).roll(i).argsort() / 8 for i in range(num_tokens + 1)]
    )
    for renormalize in (True, False):
        weights, ids = route(logits.to(dtype), top_k, renormalize)
        expected, expected_ids = reference.route(logits.to(dtype), top_k, renormalize)
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("library", LIBRARIES, ids=[library.name for library in LIBRARIES])
def test_route_of_equals_and_of_what_is_not_finite(library: Library) -> None:
    logits = torch.zeros(3, 20)
    logits[1, 7], logits[2, 3] = float("nan"), float("inf")
    weights, ids = Kernels.on_cpu(library, torch.float32).route(logits, 4, True)
    assert ids[0].tolist() == [0, 1, 2, 3]
    assert weights[0].tolist() == [0.25] * 4
    assert weights[1:].isnan().any(1).all()
    assert all(len(set(row)) == 4 and set(row) <= set(range(20)) for row in ids.tolist())


@cases
@given(num_tokens=st.integers(0, 40), num_slots=st.integers(1, 7), top_k=st.integers(1, 4))
@settings(max_examples=8, deadline=None)
def test_experts(library: Library | None, dtype: torch.dtype, num_tokens: int, num_slots: int, top_k: int) -> None:
    run_experts = Kernels.on_cpu(library, dtype).run_experts
    top_k, hidden, inner = min(top_k, num_slots), 37, 53
    x = random(num_tokens, hidden, dtype=dtype)
    slots = random(num_tokens, num_slots, dtype=torch.float32).topk(top_k).indices
    slots[slots % 5 == 3] = -1
    weights = random(num_tokens, top_k, dtype=torch.float32).abs()
    gate_up, down = (
        random(num_slots, 2 * inner, hidden, dtype=dtype) / 6,
        random(num_slots, hidden, inner, dtype=dtype) / 7,
    )
    got = run_experts(x, slots, weights, gate_up, down)
    wide = reference.run_experts(x.float(), slots, weights, gate_up.float(), down.float())
    torch.testing.assert_close(got, wide.to(dtype), atol=4 * TOLERANCE[dtype], rtol=4 * TOLERANCE[dtype])
    assert torch.equal(got, run_experts(x, slots.int(), weights, gate_up, down))
    if library is not None:
        for i in range(num_tokens):
            own = slice(i, i + 1)
            assert torch.equal(run_experts(x[own], slots[own], weights[own], gate_up, down)[0], got[i])


@pytest.mark.parametrize("library", LIBRARIES, ids=[library.name for library in LIBRARIES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bits(library: Library, dtype: torch.dtype) -> None:
    kernels = Kernels.on_cpu(library, dtype)
    x, w = random(21, 640, dtype=dtype), random(800, 640, dtype=dtype)
    keys, values = random(2, 40, 16, 2, 64, dtype=dtype)
    q, tables = random(1, 8, 64, dtype=dtype), torch.arange(40)[None]
    slots, gate_up, down = (
        torch.arange(63).view(21, 3) % 5,
        random(5, 160, 640, dtype=dtype),
        random(5, 640, 80, dtype=dtype),
    )
    found: list[tuple[torch.Tensor, ...]] = []
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            plan = kernels.plan_attention(tables, (1,), (640,), 16)
            linear, attention = kernels.linear(x, w, None), kernels.paged_attention(q, keys, values, plan, 0.125)
            found.append(
                (linear, attention, kernels.run_experts(x, slots, random(21, 3, dtype=torch.float32), gate_up, down))
            )
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert torch.equal(three, one)
