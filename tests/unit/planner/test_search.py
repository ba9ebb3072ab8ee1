"""The search: what is chosen fits, what is refused does not, and thousands of GPUs are few candidates."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.core.errors import PlanRefused
from qwen_ray.core.hardware import GB, GIB, Hardware, Node, cpu_device
from qwen_ray.core.model_config import ModelConfig, RopeConfig
from qwen_ray.core.plan import ExpertPlacement
from qwen_ray.planner.candidate import Candidate, PlanRequest, Slo
from qwen_ray.planner.family import FAMILY, lookup
from qwen_ray.planner.search import plan


def request(name: str, hardware: str, **wishes: object) -> PlanRequest:
    config = lookup(name)
    assert config is not None
    return replace(PlanRequest(config=config, hardware=Hardware.parse(hardware), model=name), **wishes)


def held_at_most(candidate: Candidate, num_blocks: int) -> dict[tuple[int, int], int]:
    """Bytes by (node, device): every GPU has one rank, a CPU node all that stand on it. Counted from the placement."""
    held: dict[tuple[int, int], int] = {}
    next_device: dict[int, int] = {}
    for replica in candidate.placement:
        for rank in candidate.ranks:
            node = replica[rank.rank // candidate.plan.stage_size]
            device = 0
            if candidate.request.kind == "cuda":
                device = next_device.get(node, 0)
                next_device[node] = device + 1
            held[node, device] = held.get((node, device), 0) + rank.total(num_blocks)
    return held


def check_fits(candidate: Candidate) -> None:
    nodes, asked = candidate.request.hardware.nodes, candidate.request
    assert candidate.reason is None
    assert candidate.engine.num_blocks >= 1
    assert len(candidate.placement) == candidate.plan.dp
    assert candidate.engine.max_model_len <= candidate.num_kv_tokens
    if asked.max_model_len is not None:
        assert candidate.engine.max_model_len == asked.max_model_len
    for (index, device), num_bytes in held_at_most(candidate, candidate.engine.num_blocks).items():
        node = nodes[index]
        assert device < node.num_devices
        shared = 1 if asked.kind == "cuda" else node.num_devices
        assert num_bytes <= node.device.memory_bytes * shared * asked.memory_utilization


requests = st.builds(
    request,
    st.sampled_from(sorted(FAMILY)),
    st.sampled_from(["1xT4-16G", "2xL4-24G", "8xA100-40G", "3x8xH100-80G", "8xH100-80G+4xA100-40G", "1xcpu-24G"])
    | st.sampled_from(["2x1xcpu-32G+1xcpu-8G", "5xA10-24G+2x3xL4-24G"]),
    max_model_len=st.none() | st.integers(16, 8192),
    tp=st.none() | st.integers(1, 9),
    pp=st.none() | st.integers(1, 6),
    dp=st.none() | st.integers(1, 3),
    concurrency=st.integers(1, 500),
    memory_utilization=st.floats(0.3, 1.0),
    num_blocks=st.none() | st.integers(1, 2000),
    max_num_seqs=st.integers(1, 256),
    max_num_batched_tokens=st.sampled_from([256, 2048, 8192]),
)


mixtures = st.builds(
    request,
    st.sampled_from(sorted(name for name, config in FAMILY.items() if config.moe)),
    st.sampled_from(["8xA100-40G", "3x8xH100-80G", "8xH100-80G+4xA100-40G", "2x1xcpu-64G+1xcpu-24G"]),
    ep=st.sampled_from([2, 4]),
    pp=st.none() | st.integers(1, 4),
    dtype=st.sampled_from([None, "fp8"]),
    num_redundant_experts=st.sampled_from([0, 4]),
    concurrency=st.integers(1, 500),
)


@given(asked=requests | mixtures)
@settings(max_examples=40, deadline=None)
def test_the_chosen_fits_and_the_rejected_do_not(asked: PlanRequest) -> None:
    report = plan(asked)
    assert report.candidates
    for candidate in report.candidates:
        if candidate.fits:
            check_fits(candidate)
            assert candidate.estimate is not None
            assert 0 < candidate.estimate.ttft < math.inf
            assert 0 < candidate.estimate.tokens_per_s < math.inf
        elif candidate.needed_bytes:
            assert candidate.needed_bytes > candidate.usable_bytes
            with pytest.raises(PlanRefused):
                candidate.engine_config()
    if report.chosen is None:
        with pytest.raises(PlanRefused) as refused:
            report.require()
        assert refused.value.inequality is not None
        assert " > " in refused.value.inequality
    else:
        assert report.require() is report.candidates[0]


@given(asked=requests)
@settings(max_examples=25, deadline=None)
def test_a_refusal_of_one_gpu_is_right(asked: PlanRequest) -> None:
    """On one device the whole arithmetic is one line."""
    asked = replace(asked, hardware=Hardware.parse("1xA10-24G"), tp=None, pp=None, dp=None, num_blocks=None)
    report = plan(asked)
    (candidate,) = report.candidates
    (rank,) = candidate.ranks
    tokens = asked.max_model_len or min(asked.context_limit, asked.prompt_len + asked.output_len)
    needed = rank.weights + rank.tables + rank.activations + rank.reserve + math.ceil(tokens / 16) * rank.kv_per_block
    has_room = needed <= int(asked.hardware.nodes[0].device.memory_bytes * asked.memory_utilization)
    assert candidate.fits == has_room


def test_72b_on_eight_h100_is_weighed_right() -> None:
    chosen = plan(request("Qwen/Qwen2.5-72B-Instruct", "8xH100-80G")).require()
    assert sum(rank.weights for rank in chosen.ranks) == pytest.approx(145.4e9 * len(chosen.ranks) / 8, rel=0.02)
    assert (chosen.plan.tp, chosen.plan.pp, chosen.plan.dp) == (8, 1, 1)
    assert chosen.engine.max_model_len == 32768
    assert chosen.kv_bytes_per_token == 2 * 80 * 8 * 128 * 2


def test_72b_on_one_h100_is_refused_with_its_numbers() -> None:
    with pytest.raises(PlanRefused) as refused:
        plan(request("Qwen/Qwen2.5-72B-Instruct", "1xH100-80G")).require()
    assert refused.value.exit_code == 5
    inequality = refused.value.inequality or ""
    assert "weights 145.41 GB" in inequality
    assert f"> {79.6 * GIB * 0.9 / GB:.2f} GB usable" in inequality
    assert "2xH100-80G would hold it (tp=2" in str(refused.value)


def test_advice_names_degrees_and_contexts_that_fit() -> None:
    with pytest.raises(PlanRefused, match="It fits with tp=8 pp=1 dp=1"):
        plan(request("qwen2.5-72b", "8xH100-80G", tp=1, pp=1)).require()
    with pytest.raises(PlanRefused, match="fits with tp=1 pp=1 ep=1 dp_attention=1 dp=1, without redundant experts"):
        plan(request("qwen3-30b-a3b", "1xcpu-80G", ep=2, num_redundant_experts=40)).require()
    report = plan(request("qwen2.5-7b", "1xL4-24G", max_model_len=131072))
    (advice,) = [line for line in report.advice if "max_model_len" in line]
    shorter = int(advice.rstrip(".").split()[-1])
    assert plan(request("qwen2.5-7b", "1xL4-24G", max_model_len=shorter)).chosen
    assert not plan(request("qwen2.5-7b", "1xL4-24G", max_model_len=int(shorter * 1.01))).chosen


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-72b", "qwen3-235b-a22b"])
@pytest.mark.parametrize("hardware", ["125x8xH100-80G", "1000x1xL4-24G", "1x1000xH100-80G", "250x4xA100-40G"])
def test_a_thousand_gpus_are_few_candidates(name: str, hardware: str) -> None:
    """Time follows from the number of ranks that are weighed, which does not depend on the machine."""
    report = plan(request(name, hardware))
    is_moe = report.request.config.moe is not None
    assert len(report.candidates) <= (110 if is_moe else 50)
    assert sum(len(candidate.ranks) for candidate in report.candidates) <= (3200 if is_moe else 1000)


def test_degrees_that_the_model_has_not_are_refused_at_once() -> None:
    with pytest.raises(PlanRefused, match="tp=10"):
        plan(request("demo", "1xcpu-24G", tp=10))
    with pytest.raises(PlanRefused, match="pp=31"):
        plan(request("demo", "1xcpu-24G", pp=31))
    with pytest.raises(PlanRefused, match="max_model_len 9000 > 8192"):
        plan(request("demo", "1xcpu-24G", max_model_len=9000))
    with pytest.raises(PlanRefused, match="no cuda device"):
        plan(request("demo", "1xcpu-24G", device="cuda"))


@pytest.mark.parametrize(
    ("wishes", "found"),
    [
        ({"ep": 4}, {(4, 1, 4), (2, 2, 4), (1, 4, 4), (8, 1, 4), (4, 2, 4), (2, 4, 4), (1, 8, 4)}),
        ({"dp_attention": 4}, {(1, 4, 4), (2, 4, 8)}),
        ({"tp": 2, "dp_attention": 2}, {(2, 2, 4)}),
        ({"tp": 2, "ep": 1, "dp_attention": 2}, {(2, 2, 1)}),
        ({"tp": 3, "ep": 6}, {(3, 2, 6)}),
        ({"tp": 2, "num_redundant_experts": 129}, {(2, 2, 4), (2, 4, 8)}),
    ],
)
def test_degrees_of_experts_that_are_asked_for(wishes: dict[str, object], found: set[tuple[int, int, int]]) -> None:
    plans = [candidate.plan for candidate in plan(request("qwen3-30b-a3b", "8xH200-141G", **wishes)).candidates]
    assert {(plan.tp, plan.dp_attention, plan.ep) for plan in plans} == found
    assert all(candidate.stage_size * candidate.pp <= 8 for candidate in plans)


def test_on_a_cpu_ranks_are_as_many_as_are_asked_for() -> None:
    def degrees(**wishes: object) -> tuple[int, int, int]:
        chosen = plan(request("qwen3-30b-a3b", "1xcpu-128G", **wishes)).require()
        assert chosen.engine.dp_attention == chosen.plan.dp_attention
        return chosen.plan.tp, chosen.plan.dp_attention, chosen.plan.ep

    assert degrees() == (1, 1, 1)
    assert degrees(ep=2) == (1, 2, 2)
    assert degrees(tp=2, ep=2) == (2, 1, 2)
    assert degrees(tp=2, ep=1) == (2, 1, 1)


def test_dp_ranks_have_blocks_of_their_own() -> None:
    one, two = (
        plan(request("qwen3-30b-a3b", "1xcpu-256G", num_blocks=256, max_model_len=1024, **wishes)).require()
        for wishes in ({}, {"ep": 2})
    )
    assert (one.engine.num_blocks, two.engine.num_blocks) == (256, 256)
    assert (one.num_kv_tokens, two.num_kv_tokens) == (4096, 8192)
    assert (one.max_sequences, two.max_sequences) == (4, 8)
    assert one.kv_bytes_per_token == two.kv_bytes_per_token
    assert two.num_threads == max(1, one.num_threads // 2)


def test_the_ranks_of_a_stage_stay_inside_a_node() -> None:
    chosen = plan(request("qwen3-235b-a22b", "2x8xH100-80G", tp=4, dp_attention=2, ep=8, pp=2)).require()
    assert chosen.placement == ((0, 1),)
    wide = plan(request("qwen3-235b-a22b", "2x8xH100-80G", tp=8, dp_attention=2)).candidates[0]
    assert wide.reason == "tp 8 x dp_attention 2 > 8 devices of the largest node"


def test_experts_lie_where_their_load_asks() -> None:
    hot = (1000.0,) * 16 + (10.0,) * 112
    asked = request("qwen3-30b-a3b", "8xH200-141G", ep=8, tp=8, expert_load=(hot,) * 48)
    blind, seeing = (plan(replace(asked, expert_load=load)).require() for load in (None, asked.expert_load))
    assert blind.plan.experts == ExpertPlacement.even(asked.config, 8)
    assert seeing.plan.experts is not None
    assert [sum(expert < 16 for expert in own) for own in seeing.plan.experts.slots[0]] == [2] * 8
    spec = seeing.replica_spec(name="m", path="/m")
    assert spec.plan.experts == seeing.plan.experts
    copied = plan(replace(asked, num_redundant_experts=8)).require()
    assert copied.plan.experts is not None
    assert {copied.plan.experts.num_slots(rank) for rank in range(8)} == {17}
    one = 3 * 2048 * 768 * 2 * 48
    assert {a.weights - b.weights for a, b in zip(copied.ranks, seeing.ranks, strict=True)} == {one}


def test_experts_of_a_dense_model_are_refused() -> None:
    for wishes in ({"ep": 2}, {"dp_attention": 2}, {"num_redundant_experts": 1}, {"expert_load": ((1.0,),)}):
        with pytest.raises(PlanRefused, match=f"{next(iter(wishes))} is for a model with experts"):
            plan(request("qwen2.5-7b", "8xH100-80G", **wishes))


def test_degrees_that_experts_cannot_be_dealt_to_are_refused() -> None:
    with pytest.raises(PlanRefused, match="ep=3 must divide"):
        plan(request("qwen3-30b-a3b", "8xH100-80G", tp=2, dp_attention=2, ep=3))
    with pytest.raises(PlanRefused, match="ep=129"):
        plan(request("qwen3-30b-a3b", "8xH100-80G", ep=129))
    with pytest.raises(PlanRefused, match="2 redundant experts"):
        plan(request("qwen3-30b-a3b", "8xH100-80G", ep=1, num_redundant_experts=2))
    with pytest.raises(PlanRefused, match="130 slots"):
        plan(request("qwen3-30b-a3b", "1xcpu-256G", num_redundant_experts=2))


def test_too_few_devices_are_named() -> None:
    assert (
        plan(request("qwen2.5-7b", "2xH100-80G", tp=4)).candidates[0].reason == "tp 4 > 2 devices of the largest node"
    )
    reason = plan(request("qwen2.5-7b", "2x4xH100-80G", tp=4, dp=3)).candidates[0].reason
    assert reason == "tp 4 x pp 1 x dp 3 = 12 devices > 8 in groups of 4 on one node"


def test_aims_decide_between_plans_that_fit() -> None:
    fast = plan(request("qwen3-8b", "8xH100-80G", concurrency=8, slo=Slo(tpot=0.005))).require()
    assert fast.miss is None
    assert fast.estimate is not None
    assert fast.estimate.tpot <= 0.005
    never = plan(request("qwen3-8b", "8xH100-80G", slo=Slo(ttft=1e-6))).require()
    assert never.miss is not None
    assert "TTFT" in never.miss


def test_a_laptop_keeps_most_of_its_memory() -> None:
    chosen = plan(request("demo", "1xcpu-24G")).require()
    assert chosen.engine.max_model_len == 8192
    kv_bytes = chosen.ranks[0].kv_per_block * chosen.engine.num_blocks
    assert kv_bytes <= 4 * GIB
    small = plan(request("demo", "1xcpu-8G")).require()
    assert small.ranks[0].kv_per_block * small.engine.num_blocks <= 2 * GIB


def test_more_kv_memory_than_modest_is_taken_when_it_is_asked_for() -> None:
    asked = request("qwen2.5-7b", "1xcpu-64G", dtype="bfloat16", max_model_len=100_000, max_num_batched_tokens=64)
    chosen = plan(asked).require()
    assert chosen.num_kv_tokens >= 100_000
    assert chosen.ranks[0].kv_per_block * chosen.engine.num_blocks > 4 * GIB


def test_kv_memory_is_one_ranks() -> None:
    chosen = plan(request("demo", "1xcpu-24G", tp=3, pp=2, kv_memory_bytes=10**8)).require()
    largest = max(rank.kv_per_block for rank in chosen.ranks)
    assert chosen.engine.num_blocks == 10**8 // largest
    contradiction = plan(request("demo", "1xcpu-24G", kv_memory_bytes=10**7, max_model_len=8192))
    assert contradiction.chosen is None
    assert contradiction.candidates[0].reason is not None
    assert "max_model_len 8192 > 208 tokens" in contradiction.candidates[0].reason


def test_ranks_share_the_cores_of_their_node() -> None:
    config = lookup("demo")
    assert config is not None
    node = Node(device=cpu_device(num_cores=8, memory_bytes=24 * GIB), num_devices=1, num_cores=8)
    asked = PlanRequest(config=config, hardware=Hardware(nodes=(node,)))
    assert plan(asked).require().num_threads == 8
    assert plan(replace(asked, tp=3)).require().num_threads == 2
    assert plan(replace(asked, tp=3, pp=3, dp=2)).require().num_threads == 1


def test_a_chosen_plan_becomes_what_a_replica_is_told() -> None:
    chosen = plan(request("demo", "1xcpu-24G", tp=3, pp=2, num_blocks=64, max_model_len=512, max_num_seqs=8)).require()
    spec = chosen.replica_spec(name="demo", path="/models/demo.gguf", load_format="gguf")
    assert (spec.plan.tp, spec.plan.pp, spec.plan.world_size) == (3, 2, 6)
    assert (spec.engine.num_blocks, spec.engine.max_model_len, spec.engine.max_num_seqs) == (64, 512, 8)
    assert spec.engine.depth == 2
    assert (spec.dtype, spec.device, spec.load_format) == ("float32", "cpu", "gguf")
    assert len(spec.plan.shards(spec.config)) == 6


def test_stretched_positions_count() -> None:
    config = lookup("qwen2.5-7b-instruct")
    assert config is not None
    yarn = RopeConfig(theta=1e6, kind="yarn", factor=4.0, original_max_position_embeddings=32768)
    llama3 = RopeConfig(kind="llama3", factor=32.0, original_max_position_embeddings=8192)
    hardware = Hardware.parse("1xH100-80G")

    def limit(config: ModelConfig) -> int:
        return PlanRequest(config=config, hardware=hardware).context_limit

    assert limit(replace(config, rope=yarn)) == 131072
    assert limit(replace(config, rope=llama3, max_position_embeddings=131072)) == 131072


def test_unlike_machines_hold_what_the_smallest_can() -> None:
    asked = request("qwen2.5-7b-instruct", "1xH100-80G+1xA10-24G", tp=1, pp=1)
    both = plan(asked).require()
    assert both.plan.dp == 2
    check_fits(both)
    # The A10 holds 15.2 GB of weights, but not in float32: the H100 alone serves then.
    assert plan(replace(asked, dtype="float32")).require().plan.dp == 1
    nodes = request("qwen2.5-7b-instruct", "2x1xcpu-32G+1xcpu-8G")
    assert plan(nodes).require().plan.dp == 2
