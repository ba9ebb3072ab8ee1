"""Which architectures are served, and that loading fills a whole stage with its own part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen_ray.core.errors import CheckpointError, SettingsError
from qwen_ray.core.model_config import ARCHITECTURES, ModelConfig, MoeConfig, RopeConfig
from qwen_ray.core.plan import ParallelPlan, Shard, Span
from qwen_ray.kernels.cpu import library
from qwen_ray.models import registry
from qwen_ray.models.stage import Stage
from qwen_ray.parallel.groups import Groups

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    architecture="qwen2", vocab_size=50, hidden_size=16, intermediate_size=64, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=4, rms_norm_eps=1e-6, rope=RopeConfig(),
    max_position_embeddings=32, tie_word_embeddings=True, qkv_bias=True, qk_norm=False,
)  # fmt: skip


class Recorded:
    """A Checkpoint that writes down what is read, and gives ones."""

    def __init__(self) -> None:
        self.num_elements: dict[str, int] = {}

    def read(
        self, name: str, shape: tuple[int, ...], *, rows: Span | None = None, columns: Span | None = None
    ) -> torch.Tensor:
        assert name not in self.num_elements, f"{name} is read twice"
        size = list(shape)
        if rows is not None:
            size[0] = len(rows)
        if columns is not None:
            size[1] = len(columns)
        tensor = torch.ones(size)
        self.num_elements[name] = tensor.numel()
        return tensor

    def read_four_bits(self, *_asked: object, **_cut: object) -> None:
        return None


def stage(config: ModelConfig, shard: Shard) -> Stage:
    """A stage that is never run: its group is not joined."""
    return registry.build(config, shard, Groups(shard, CPU), CPU, torch.float32, max_len=8)


def test_every_architecture_has_a_page() -> None:
    assert registry.LAYERS.keys() == set(ARCHITECTURES)


def test_architectures_without_a_page_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry.LAYERS, "qwen2")
    with pytest.raises(CheckpointError, match=r"'qwen2' is not served.*llama.*qwen3_moe"):
        stage(CONFIG, ParallelPlan.of(CONFIG).shard(CONFIG, 0))


def check_that_every_rank_reads_what_it_holds(config: ModelConfig, plan: ParallelPlan) -> None:
    for shard in plan.shards(config):
        model, checkpoint = stage(config, shard), Recorded()
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        model.load(checkpoint)
        assert all((parameter == 1).all() for parameter in model.parameters())
        assert sum(checkpoint.num_elements.values()) == sum(parameter.numel() for parameter in model.parameters())
        assert model.num_bytes == 4 * (sum(checkpoint.num_elements.values()) + 2 * 8 * config.head_dim // 2)
        layers = {int(name.split(".")[2]) for name in checkpoint.num_elements if ".layers." in name}
        assert layers == set(shard.layers)
        for layer in shard.layers:
            prefix = f"model.layers.{layer}.mlp.experts."
            experts = {int(name[len(prefix) :].split(".")[0]) for name in checkpoint.num_elements if prefix in name}
            assert experts == set(shard.own_experts(layer))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (3, 1), (1, 3), (4, 2)])
def test_every_rank_reads_exactly_what_it_holds(tp: int, pp: int, tied: bool) -> None:
    config = replace(CONFIG, tie_word_embeddings=tied)
    check_that_every_rank_reads_what_it_holds(config, ParallelPlan.of(config, tp=tp, pp=pp))


@pytest.mark.parametrize("architecture", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    ("tp", "pp", "ep", "dp_attention"),
    [(1, 1, 1, 1), (2, 1, 2, 1), (1, 3, 2, 2), (2, 1, 1, 1), (2, 1, 2, 2), (1, 1, 5, 5)],
)
def test_every_rank_reads_its_own_experts(architecture: str, tp: int, pp: int, ep: int, dp_attention: int) -> None:
    shared = 96 if architecture == "qwen2_moe" else 0
    moe = MoeConfig(
        num_experts=7, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True,
        shared_expert_intermediate_size=shared, mlp_only_layers=(1,),
    )  # fmt: skip
    config = replace(CONFIG, architecture=architecture, qk_norm=not shared, qkv_bias=bool(shared), moe=moe)
    plan = ParallelPlan.of(config, tp=tp, pp=pp, ep=ep, dp_attention=dp_attention)
    check_that_every_rank_reads_what_it_holds(config, plan)


def test_a_tied_matrix_is_held_once_where_both_ends_meet() -> None:
    model = stage(CONFIG, ParallelPlan.of(CONFIG).shard(CONFIG, 0))
    assert model.embed_tokens is not None
    assert model.lm_head is not None
    assert model.lm_head.matrix is model.embed_tokens


def test_attention_layers_tell_the_shape_of_their_cache() -> None:
    shard = ParallelPlan.of(CONFIG, tp=3).shard(CONFIG, 0)
    attentions = stage(CONFIG, shard).attentions
    assert [(a.num_heads, a.num_kv_heads, a.head_dim) for a in attentions] == [(1, 1, 4)] * 3


def test_deterministic_wants_kernels_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = ParallelPlan.of(CONFIG).shard(CONFIG, 0)
    model = registry.build(CONFIG, shard, Groups(shard, CPU), CPU, torch.bfloat16, max_len=8, deterministic=True)
    assert model.num_weights > 0
    monkeypatch.setattr(library, "load", lambda: None)
    with pytest.raises(
        SettingsError, match=r"engine\.deterministic: this machine has no kernels for torch\.bfloat16 on"
    ):
        registry.build(CONFIG, shard, Groups(shard, CPU), CPU, torch.bfloat16, max_len=8, deterministic=True)
