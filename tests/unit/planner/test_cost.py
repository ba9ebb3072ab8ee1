"""Estimates: against published figures, and the ways in which they must move."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen_ray.core.hardware import Hardware
from qwen_ray.core.plan import ParallelPlan
from qwen_ray.planner.candidate import PlanRequest
from qwen_ray.planner.cost import (
    Estimate,
    Site,
    StepLoad,
    exchange_bytes_per_token,
    rank_seconds,
    reduce_bytes_per_token,
    stage_seconds,
)
from qwen_ray.planner.family import lookup
from qwen_ray.planner.search import plan


def estimated(name: str, hardware: str, **wishes: int | str) -> Estimate:
    config = lookup(name)
    assert config is not None
    request = replace(PlanRequest(config=config, hardware=Hardware.parse(hardware)), **wishes)
    found = plan(request).require().estimate
    assert found is not None
    return found


# Output tokens/s of one stream, A100 80 GB, vLLM 0.6.3: Qwen2.5's speed benchmark.
A100 = {
    ("0.5b", 1): 311.55,
    ("1.5b", 1): 183.33,
    ("3b", 1): 127.61,
    ("7b", 1): 84.28,
    ("14b", 1): 46.30,
    ("32b", 1): 22.13,
    ("72b", 2): 18.19,
    ("72b", 4): 31.37,
}
# Output tokens/s of Qwen3-8B on one H100 with (prompt, output, users), vLLM 0.30: silybench.
H100 = {
    (128, 128, 512): 14540,
    (128, 1024, 396): 13322,
    (1024, 128, 80): 3018,
    (2048, 2048, 40): 2815,
    (8192, 512, 7): 502,
}


@pytest.mark.parametrize(("size", "tp"), A100)
def test_one_stream_is_near_the_published_speed(size: str, tp: int) -> None:
    found = estimated(f"qwen2.5-{size}-instruct", f"{tp}xA100-80G", tp=tp, concurrency=1, prompt_len=1, output_len=2048)
    assert 1 / found.tpot == pytest.approx(A100[size, tp], rel=1 / 3)


@pytest.mark.parametrize(("prompt_len", "output_len", "users"), H100)
def test_throughput_is_near_the_published_one(prompt_len: int, output_len: int, users: int) -> None:
    found = estimated(
        "qwen3-8b", "1xH100-80G", concurrency=users, prompt_len=prompt_len, output_len=output_len, max_num_seqs=512
    )
    assert found.tokens_per_s == pytest.approx(H100[prompt_len, output_len, users], rel=1 / 3)


def test_a_mixture_reads_what_its_tokens_touch() -> None:
    """One token reads 8 of 128 experts, a large batch all of them."""
    config = lookup("qwen3-30b-a3b")
    assert config is not None
    shard = ParallelPlan.of(config).shard(config, 0)
    site = Site(node=Hardware.parse("1xH100-80G").nodes[0], index=0)

    def seconds(num_tokens: int) -> float:
        return rank_seconds(config, shard, "bfloat16", site, shared_load(num_tokens, num_tokens))

    head = config.vocab_size * config.hidden_size
    active = 2 * (config.num_active_parameters - head - config.hidden_size)  # bytes; the embedding is not read
    assert seconds(1) == pytest.approx(active / (0.7 * 3350e9), rel=1e-3)
    everything = 2 * (config.num_parameters - head - config.hidden_size)
    assert seconds(128) == pytest.approx(everything / (0.7 * 3350e9), rel=1e-2)


def shared_load(num_tokens: int, num_shared_tokens: int, imbalance: float = 1.0) -> StepLoad:
    return StepLoad(
        num_tokens=num_tokens,
        num_sequences=num_tokens,
        context=1,
        num_kv_tokens=0,
        num_shared_tokens=num_shared_tokens,
        imbalance=imbalance,
    )


def test_whole_experts_are_read_unevenly_by_few_tokens_and_alike_by_many() -> None:
    """Of 8 experts for a token, a rank of 8 has one on average and the fullest of them about three."""
    config = lookup("qwen3-30b-a3b")
    assert config is not None
    site = Site(node=Hardware.parse("8xH100-80G").nodes[0], index=0)
    cut, whole = (ParallelPlan.of(config, tp=8, ep=ep).shard(config, 0) for ep in (1, 8))

    def extra(num_tokens: int) -> float:
        """Experts' worth of bytes that the fullest rank reads beyond an eighth of what is touched."""
        load = shared_load(num_tokens, num_tokens)
        seconds = [rank_seconds(config, shard, "bfloat16", site, load) for shard in (cut, whole)]
        return (seconds[1] - seconds[0]) * 0.7 * 3350e9 / (48 * 3 * 2048 * 768 * 2)

    assert extra(1) == pytest.approx(2, abs=0.5)
    assert extra(512) == pytest.approx(0, abs=0.01)


def test_a_load_that_is_known_slows_the_fullest_rank() -> None:
    config = lookup("qwen3-235b-a22b")
    assert config is not None
    plan = ParallelPlan.of(config, ep=8)
    site = Site(node=Hardware.parse("8xH100-80G").nodes[0], index=0)
    even, skewed = (
        stage_seconds(config, plan, "bfloat16", (site,), shared_load(4096, 8 * 4096, imbalance))[0]
        for imbalance in (1.0, 2.0)
    )
    # What the experts compute: 8 x 4,096 tokens x 8 choices / 8 ranks x 2 x 18.9 M x 94 layers at half of 989 TFLOP/s.
    computed = 4096 * 8 * 2 * 3 * 4096 * 1536 * 94 / (0.5 * 989e12)
    # What reaches the fullest rank: of 8 x 4,096 tokens, 5.25 / 8 x 7 / 8, there and back.
    exchanged = 8 * 4096 * (1 - (7 / 8) ** 8) * 7 / 8 * (2 * 4096 * 2 + 64) * 94 / 450e9
    assert skewed - even == pytest.approx(computed + exchanged, rel=0.01)


def test_bytes_between_ranks() -> None:
    """8 choices among 8 ranks reach 8 (1 - (7/8)^8) = 5.25 of them, 7/8 of them another one."""
    config = lookup("qwen3-235b-a22b")
    assert config is not None
    rows = 8 * (1 - (7 / 8) ** 8) * 7 / 8
    dispatched = ParallelPlan.of(config, ep=8)
    assert exchange_bytes_per_token(config, dispatched, "bfloat16") == pytest.approx(rows * (2 * 8192 + 64))
    assert exchange_bytes_per_token(config, dispatched, "fp8") == pytest.approx(rows * (2 * 8192 + 64))
    assert reduce_bytes_per_token(config, dispatched, "bfloat16") == 0
    replicated = ParallelPlan.of(config, tp=8, ep=8)
    assert exchange_bytes_per_token(config, replicated, "bfloat16") == 0
    assert reduce_bytes_per_token(config, replicated, "bfloat16") == 2 * 7 / 8 * 8192
    # Every expert cut over both ranks: a token goes to the other one, whatever it chooses.
    cut = ParallelPlan.of(config, dp_attention=2)
    assert exchange_bytes_per_token(config, cut, "bfloat16") == pytest.approx(2 * 8192 + 64)


def test_attention_for_sequences_of_its_own_pays_when_there_are_many() -> None:
    """With 4 KV heads, eight tensor ranks read every KV cache twice; eight dp ranks read each once."""
    many, few = (
        [
            estimated(
                "qwen3-235b-a22b",
                "8xH200-141G",
                dtype="fp8",
                tp=tp,
                dp_attention=8 // tp,
                ep=8,
                pp=1,
                concurrency=concurrency,
                max_num_seqs=1024,
            ).tokens_per_s
            for tp in (1, 8)
        ]
        for concurrency in (2000, 1)
    )
    assert many[0] > 1.3 * many[1]
    assert few[0] < few[1]


def test_the_slowest_rank_rules() -> None:
    """Three ranks cannot share four KV heads evenly: they are no faster than two."""
    config = lookup("qwen2.5-7b")
    assert config is not None
    config = replace(config, intermediate_size=96)  # so that attention is nearly all of a layer
    site = Site(node=Hardware.parse("8xH100-80G").nodes[0], index=0)
    load = StepLoad(num_tokens=64, num_sequences=64, context=30_000, num_kv_tokens=64 * 30_000, num_shared_tokens=64)
    two, three, four = (
        stage_seconds(config, ParallelPlan.of(config, tp=tp), "bfloat16", (site,), load)[0] for tp in (2, 3, 4)
    )
    assert three == pytest.approx(two, rel=0.05)
    assert four < 0.6 * two


def test_stages_on_two_nodes_pay_for_the_network() -> None:
    config = lookup("qwen2.5-72b")
    assert config is not None
    node = replace(Hardware.parse("8xH100-80G").nodes[0], network_bandwidth=1e9)
    load = StepLoad(num_tokens=2048, num_sequences=1, context=1024, num_kv_tokens=1024, num_shared_tokens=2048)
    near, far = (
        stage_seconds(
            config,
            ParallelPlan.of(config, tp=4, pp=2),
            "bfloat16",
            (Site(node=node, index=0), Site(node=node, index=other)),
            load,
        )
        for other in (0, 1)
    )
    # 2,048 rows of 8,192 bf16 numbers are 33.6 MB: 33.6 ms at 1 GB/s.
    assert far[0] - near[0] == pytest.approx(33.6e-3, rel=0.01)
    assert far[1] == near[1]


def test_ranks_that_share_a_cpu_share_its_speed() -> None:
    config = lookup("demo")
    assert config is not None
    hardware = Hardware.parse("1xcpu-24G")
    alone, shared = (
        plan(PlanRequest(config=config, hardware=hardware, tp=tp, concurrency=1, max_model_len=2048)).require().estimate
        for tp in (1, 3)
    )
    assert alone is not None
    assert shared is not None
    assert shared.tpot > alone.tpot
