"""Logits of models with experts against transformers', in float32, for every way of spreading them over processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import Life, Ranks, Steps, forward_steps, free_address
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen_ray.core.model_config import ModelConfig
from qwen_ray.core.plan import ParallelPlan
from qwen_ray.core.step import MoveExperts

TOLERANCE = 1e-4
VOCAB = 131

LENGTHS = (11, 23, 7, 9)
SEQUENCES = [
    [int(t) for t in torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(n))] for n in LENGTHS
]
# By dp rank, all of the same number of steps. The first has two sequences; the second is idle in the middle, the
# fourth except at the end.
IDLE: tuple[list[tuple[int, int, int]], list[int]] = ([], [])
PARTS: list[Steps] = [
    [
        ([(0, 0, 9), (1, 0, 5)], list(range(14))),
        ([(1, 5, 9), (0, 9, 1)], list(range(10))),
        ([(0, 10, 1)], [0]),
        IDLE,
    ],
    [([(2, 0, 6)], [5]), IDLE, IDLE, ([(2, 6, 1)], [0])],
    [IDLE, ([(3, 0, 4)], []), ([(3, 4, 4)], [3]), ([(3, 8, 1)], [0])],
    [IDLE, IDLE, IDLE, ([(2, 0, 1)], [0])],
]

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 56, "intermediate_size": 96, "moe_intermediate_size": 20,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_hidden_layers": 3,
    "num_experts": 7, "num_experts_per_tok": 3,
}  # fmt: skip
CONFIGS = {
    "qwen2": Qwen2MoeConfig(**COMMON, shared_expert_intermediate_size=40),
    # As `norm_topk_prob`, and a dense layer at the end.
    "qwen2-sparse-step": Qwen2MoeConfig(
        **COMMON, shared_expert_intermediate_size=40, norm_topk_prob=True, decoder_sparse_step=2
    ),
    "qwen3": Qwen3MoeConfig(**COMMON, head_dim=16, norm_topk_prob=True, tie_word_embeddings=True),
    "qwen3-mlp-only": Qwen3MoeConfig(**COMMON, head_dim=16, norm_topk_prob=True, mlp_only_layers=[0]),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(4)
    yield processes
    processes.close()


class Reference:
    """A random model of transformers, and the file that our ranks read."""

    def __init__(self, config: Qwen2MoeConfig | Qwen3MoeConfig, folder: Path) -> None:
        torch.manual_seed(0)
        make = Qwen2MoeForCausalLM if isinstance(config, Qwen2MoeConfig) else Qwen3MoeForCausalLM
        self.model: PreTrainedModel = make(config).eval()
        for key, parameter in self.model.named_parameters():
            if "norm" in key:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                torch.nn.init.normal_(parameter, std=1.0 if key.endswith("mlp.gate.weight") else 0.1)
        self.config = ModelConfig.from_dict(config.to_dict())
        self.path = folder / "weights.pt"
        self.save()

    def save(self) -> None:
        torch.save(apart(self.model.state_dict()), self.path)
        with torch.inference_mode():
            self.logits = [self.model(torch.tensor([tokens])).logits[0] for tokens in SEQUENCES]

    def check(self, ranks: Ranks, plan: ParallelPlan, moves: dict[int, list[MoveExperts]] | None = None) -> list[Life]:
        """Every dp rank's logits are those of transformers, whatever `moves` before which step."""
        arguments = (self.config, plan, free_address(), str(self.path), SEQUENCES, PARTS, moves or {})
        lives: list[Life] = ranks.run(plan.world_size, forward_steps, *arguments)
        samplers = [shard for shard in plan.shards(self.config) if shard.samples]
        assert [shard.dp_rank for shard in samplers] == list(range(plan.dp_attention))
        for shard in samplers:
            steps = PARTS[shard.dp_rank]
            for (chunks, rows), got in zip(steps, lives[shard.rank].logits, strict=True):
                parts = [self.logits[s][start : start + count] for s, start, count in chunks]
                want = torch.cat(parts)[rows] if parts else torch.empty(0, VOCAB)
                assert got.shape == want.shape
                assert got.dtype is torch.float32
                torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
        return lives


def apart(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts one by one, as checkpoints have them, in place of transformers' stacks."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj", name)
        if match is None:
            found[name] = tensor
            continue
        for expert, own in enumerate(tensor):
            parts = {"gate": own.chunk(2)[0], "up": own.chunk(2)[1]} if match[2] == "gate_up" else {"down": own}
            found |= {f"{match[1]}.{expert}.{part}_proj.weight": value.clone() for part, value in parts.items()}
    return found


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    return {name: Reference(config, tmp_path_factory.mktemp(name)) for name, config in CONFIGS.items()}


# (tp, pp, ep, dp_attention): all that fit 4 processes with tp, pp in {1, 2} and ep in {1, 2, 4}; then experts that are
# cut over the ranks of several dp ranks, and over two of four.
DEGREES = [
    *((1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (2, 2, 1, 1)),
    *((1, 1, 2, 2), (2, 1, 2, 1), (1, 2, 2, 2), (2, 2, 2, 1), (2, 1, 2, 2)),
    *((1, 1, 4, 4), (2, 1, 4, 2)),
    *((1, 1, 1, 2), (2, 1, 1, 2), (1, 2, 1, 2), (1, 1, 2, 4), (1, 1, 1, 4)),
]


@pytest.mark.parametrize(("tp", "pp", "ep", "dp_attention"), DEGREES)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(
    ranks: Ranks, references: dict[str, Reference], name: str, tp: int, pp: int, ep: int, dp_attention: int
) -> None:
    reference = references[name]
    plan = ParallelPlan.of(reference.config, tp=tp, pp=pp, ep=ep, dp_attention=dp_attention)
    reference.check(ranks, plan)
