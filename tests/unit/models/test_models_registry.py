"""Which architectures are served, and that loading fills a whole stage with its own part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.model_config import ModelConfig, RopeConfig
from qwen_ray.core.plan import ParallelPlan, Rendezvous, Shard, Span
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


def stage(config: ModelConfig, shard: Shard) -> Stage:
    """A stage that is never run: its group is not joined."""
    alone = replace(shard, world_size=1)
    return registry.build(
        config, shard, Groups.join(alone, Rendezvous(address="", name=""), CPU), CPU, torch.float32, max_len=8
    )


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2_moe", "qwen3_moe"])
def test_architectures_without_a_page_are_refused(architecture: str) -> None:
    config = replace(CONFIG, architecture=architecture)
    with pytest.raises(CheckpointError, match=f"{architecture}.*llama, qwen2"):
        stage(config, ParallelPlan.of(config).shard(config, 0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (3, 1), (1, 3), (4, 2)])
def test_every_rank_reads_exactly_what_it_holds(tp: int, pp: int, tied: bool) -> None:
    config = replace(CONFIG, tie_word_embeddings=tied)
    for shard in ParallelPlan.of(config, tp=tp, pp=pp).shards(config):
        model, checkpoint = stage(config, shard), Recorded()
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        model.load(checkpoint)
        assert all((parameter == 1).all() for parameter in model.parameters())
        assert sum(checkpoint.num_elements.values()) == sum(parameter.numel() for parameter in model.parameters())
        assert model.num_bytes == 4 * (sum(checkpoint.num_elements.values()) + 2 * 8 * config.head_dim // 2)
        layers = {int(name.split(".")[2]) for name in checkpoint.num_elements if ".layers." in name}
        assert layers == set(shard.layers)


def test_a_tied_matrix_is_held_once_where_both_ends_meet() -> None:
    model = stage(CONFIG, ParallelPlan.of(CONFIG).shard(CONFIG, 0))
    assert model.embed_tokens is not None
    assert model.lm_head is not None
    assert model.lm_head.matrix is model.embed_tokens


def test_attention_layers_tell_the_shape_of_their_cache() -> None:
    shard = ParallelPlan.of(CONFIG, tp=3).shard(CONFIG, 0)
    attentions = stage(CONFIG, shard).attentions
    assert [(a.num_heads, a.num_kv_heads, a.head_dim) for a in attentions] == [(1, 1, 4)] * 3
