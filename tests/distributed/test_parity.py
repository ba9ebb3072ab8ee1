"""Logits of the sharded model against transformers', in float32, over real processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import Ranks, forward_steps, free_address
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qwen_ray.core.model_config import ModelConfig
from qwen_ray.core.plan import ParallelPlan

TOLERANCE = 1e-4
VOCAB = 131

SEQUENCES = [
    [int(t) for t in torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(n))] for n in (11, 23, 7)
]
# Steps of (sequence, start, count): prompts whole and in chunks, decodes among them; and the rows that want logits.
STEPS = [
    ([(0, 0, 9), (1, 0, 5)], list(range(14))),
    ([(1, 5, 9), (0, 9, 1), (2, 0, 6)], list(range(16))),
    ([(0, 10, 1), (1, 14, 8), (2, 6, 1)], [0, 8, 9]),
    ([(1, 22, 1)], [0]),
]

COMMON: dict[str, Any] = {"vocab_size": VOCAB, "intermediate_size": 96, "max_position_embeddings": 64}
CONFIGS = {
    "gqa14-2-tied": Qwen2Config(
        **COMMON, hidden_size=56, num_hidden_layers=3, num_attention_heads=14, num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "gqa28-4-untied": Qwen2Config(
        **(COMMON | {"intermediate_size": 101}), hidden_size=112, num_hidden_layers=4, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "llama3": LlamaConfig(
        **COMMON, hidden_size=144, num_hidden_layers=3, num_attention_heads=9, num_key_value_heads=3,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
    ),
    "yarn": Qwen2Config(
        **COMMON, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        },
    ),
    # Heads of their own size, norms on queries and keys, no biases.
    "qwen3": Qwen3Config(
        **COMMON, hidden_size=56, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, head_dim=16,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
MODELS = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(12)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PreTrainedModel, Path]]:
    """Every config with random weights, biases among them, and the file that the ranks read."""
    made: dict[str, tuple[PreTrainedModel, Path]] = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = MODELS[config.model_type](config).eval()
        for key, parameter in model.named_parameters():
            if "norm" in key:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                torch.nn.init.normal_(parameter, std=0.1)
        path = tmp_path_factory.mktemp("weights") / f"{name}.pt"
        torch.save(model.state_dict(), path)
        made[name] = (model, path)
    return made


def check(ranks: Ranks, model: PreTrainedModel, path: Path, *, tp: int, pp: int) -> None:
    config = ModelConfig.from_dict(model.config.to_dict())
    plan = ParallelPlan.of(config, tp=tp, pp=pp)
    arguments = (config, plan, free_address(), str(path), SEQUENCES, [STEPS])
    answers = ranks.run(plan.world_size, forward_steps, *arguments)
    with torch.inference_mode():
        expected = [model(torch.tensor([tokens])).logits[0] for tokens in SEQUENCES]
    logits = answers[(pp - 1) * tp].logits
    assert len(logits) == len(STEPS)
    for (chunks, rows), got in zip(STEPS, logits, strict=True):
        want = torch.cat([expected[s][start : start + count] for s, start, count in chunks])[rows]
        assert got.shape == want.shape
        assert got.dtype is torch.float32
        assert (got - want).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("pp", [1, 2, 3])
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["gqa14-2-tied", "gqa28-4-untied", "qwen3"])
def test_logits_equal_those_of_transformers(
    ranks: Ranks, models: dict[str, tuple[PreTrainedModel, Path]], name: str, tp: int, pp: int
) -> None:
    check(ranks, *models[name], tp=tp, pp=pp)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("name", ["llama3", "yarn"])
def test_scaled_rope_and_no_biases(
    ranks: Ranks, models: dict[str, tuple[PreTrainedModel, Path]], name: str, tp: int, pp: int
) -> None:
    check(ranks, *models[name], tp=tp, pp=pp)


@pytest.mark.parametrize(("name", "tp", "pp"), [("gqa14-2-tied", 1, 1), ("gqa28-4-untied", 2, 2), ("yarn", 1, 1)])
def test_shards_add_up_to_the_model(
    ranks: Ranks, models: dict[str, tuple[PreTrainedModel, Path]], name: str, tp: int, pp: int
) -> None:
    """No weight is held twice, but for norms on the tensor ranks."""
    model, path = models[name]
    config = ModelConfig.from_dict(model.config.to_dict())
    plan = ParallelPlan.of(config, tp=tp, pp=pp)
    arguments = (config, plan, free_address(), str(path), SEQUENCES, [STEPS[:1]])
    answers = ranks.run(plan.world_size, forward_steps, *arguments)
    tables = 2 * 64 * config.head_dim // 2
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert sum(life.num_bytes for life in answers) == 4 * (weights + (tp - 1) * norms + plan.world_size * tables)
