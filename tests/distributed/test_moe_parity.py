"""Logits of models with experts against transformers', in float32, for every way of spreading them over processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import CPU, Life, Ranks, Steps, forward_steps, free_address, last_lens
from safetensors.torch import save_file
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen_ray.core.model_config import ModelConfig, Quantization
from qwen_ray.core.plan import ExpertPlacement, ParallelPlan
from qwen_ray.core.step import MoveExperts
from qwen_ray.layers.expert_map import Slots
from qwen_ray.models import registry
from qwen_ray.parallel.groups import Groups
from qwen_ray.worker.weights import open_checkpoint

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

    def check(
        self,
        ranks: Ranks,
        plan: ParallelPlan,
        moves: dict[int, list[MoveExperts]] | None = None,
        dtype: torch.dtype = torch.float32,
        tolerance: float = TOLERANCE,
        quantization: Quantization = "none",
    ) -> list[Life]:
        """Every dp rank's logits are those of transformers in float32, whatever `moves` before which step.

        Each logit within `tolerance`; of quantized weights the root of the mean square of each token's, since among
        thousands of rounding errors some are five times as large as most.
        """
        arguments = (self.config, plan, free_address(), str(self.path), SEQUENCES, PARTS, moves or {}, dtype)
        arguments = (*arguments, quantization)
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
                if quantization == "none":
                    torch.testing.assert_close(got, want, atol=tolerance, rtol=0)
                else:
                    assert (got - want).square().mean(1).sqrt().le(tolerance).all()
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


@pytest.mark.parametrize(("tp", "ep", "dp_attention"), [(1, 1, 1), (2, 2, 1), (2, 2, 2)])
def test_in_a_short_type(ranks: Ranks, references: dict[str, Reference], tp: int, ep: int, dp_attention: int) -> None:
    """The logits' deviation is about 2."""
    plan = ParallelPlan.of(references["qwen2"].config, tp=tp, ep=ep, dp_attention=dp_attention)
    references["qwen2"].check(ranks, plan, dtype=torch.bfloat16, tolerance=0.3)


def test_with_copies_of_hot_experts(ranks: Ranks, references: dict[str, Reference]) -> None:
    """Which copy a token goes to changes nothing but its way."""
    reference = references["qwen2"]
    layer = ((0, 1, 2, 6, 4), (4, 5, 6, 3, 0))
    placement = ExpertPlacement(slots=(layer, layer[::-1], layer))
    for tp, dp_attention in ((2, 1), (1, 2), (2, 2)):
        plan = ParallelPlan.of(reference.config, tp=tp, ep=2, dp_attention=dp_attention, experts=placement)
        lives = reference.check(ranks, plan)
        for shard in plan.shards(reference.config):
            for i in range(3):
                own, counts = shard.own_experts(i), lives[shard.rank].expert_tokens[i]
                assert all(expert in own for expert, count in enumerate(counts) if count)
                assert sum(counts[expert] for expert in (0, 4, 6)) > 0  # of these, each rank has a copy


@pytest.mark.parametrize(("tp", "pp", "ep", "dp_attention"), [(1, 1, 1, 1), (2, 1, 2, 1), (1, 2, 2, 2), (1, 1, 4, 4)])
def test_every_token_is_counted_once_for_each_of_its_experts(
    ranks: Ranks, references: dict[str, Reference], tp: int, pp: int, ep: int, dp_attention: int
) -> None:
    reference = references["qwen2-sparse-step"]
    plan = ParallelPlan.of(reference.config, tp=tp, pp=pp, ep=ep, dp_attention=dp_attention)
    lives = reference.check(ranks, plan)
    num_tokens = sum(count for part in PARTS[:dp_attention] for chunks, _ in part for _, _, count in chunks)
    totals: dict[int, int] = {}
    for shard in plan.shards(reference.config):
        for layer, counts in zip(shard.layers, lives[shard.rank].expert_tokens, strict=True):
            assert len(counts) == (7 if layer == 1 else 0)
            assert all(expert in shard.own_experts(layer) for expert, count in enumerate(counts) if count)
            totals[layer] = totals.get(layer, 0) + (sum(counts) if shard.expert_tp_rank == 0 else 0)
    assert totals == {0: 0, 1: 3 * num_tokens, 2: 0}


def placement(seed: int, ep: int, num_slots: int) -> Slots:
    """Seven experts on `ep` ranks, `num_slots` on each: some twice."""
    order = torch.Generator().manual_seed(seed)
    experts = torch.randperm(7, generator=order).tolist()
    ranks = [experts[i::ep] for i in range(ep)]
    for own in ranks:
        others = [e for e in torch.randperm(7, generator=order).tolist() if e not in own]
        own += others[: num_slots - len(own)]
    return tuple(map(tuple, ranks))


@pytest.mark.parametrize(
    ("tp", "pp", "ep", "dp_attention", "quantization"),
    [
        *[(2, 1, 2, 1, "none"), (1, 1, 2, 2, "none"), (2, 1, 2, 2, "none"), (1, 2, 2, 2, "none")],
        *[(1, 1, 4, 4, "none"), (4, 1, 4, 1, "none"), (2, 1, 2, 1, "int8"), (1, 1, 2, 2, "int8"), (1, 1, 2, 2, "int4")],
    ],
)
def test_experts_change_places_between_steps(
    ranks: Ranks,
    references: dict[str, Reference],
    tp: int,
    pp: int,
    ep: int,
    dp_attention: int,
    quantization: Quantization,
) -> None:
    reference = references["qwen3-mlp-only"]
    now = {layer: placement(layer, ep, 4) for layer in (1, 2)}
    experts = ExpertPlacement(slots=((), now[1], now[2]))
    plan = ParallelPlan.of(reference.config, tp=tp, pp=pp, ep=ep, dp_attention=dp_attention, experts=experts)
    moves: dict[int, list[MoveExperts]] = {}
    num_moved = 0
    for step, layer in enumerate((1, 2, 1, 2)):
        slots = placement(10 + step, ep, 4)
        moves.setdefault(step, []).append(MoveExperts(layer=layer, slots=slots))
        num_moved += sum(len(set(new) - set(own)) for own, new in zip(now[layer], slots, strict=True))
        now[layer] = slots
    tolerance = {"none": TOLERANCE, "int8": 0.06, "int4": 0.4}[quantization]  # the logits' deviation is 0.88
    lives = reference.check(ranks, plan, moves, tolerance=tolerance, quantization=quantization)
    assert num_moved > 0
    assert sum(life.num_moved for life in lives) == num_moved * plan.expert_tp


@pytest.fixture(scope="module")
def forced(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A model whose routers send every token to expert 5: the first element of all hidden states is large."""
    config = Qwen3MoeConfig(**(COMMON | {"num_experts_per_tok": 1}), head_dim=16)
    reference = Reference(config, tmp_path_factory.mktemp("forced"))
    state = reference.model.state_dict()
    state["model.embed_tokens.weight"][:, 0] = 5.0
    for layer in range(3):
        router = state[f"model.layers.{layer}.mlp.gate.weight"]
        router.zero_()
        router[5, 0] = 3.0
    reference.save()
    return reference


@pytest.mark.parametrize(
    ("tp", "ep", "dp_attention"), [(1, 1, 1), (2, 2, 1), (4, 4, 1), (1, 2, 2), (1, 4, 4), (2, 4, 2), (1, 1, 2)]
)
def test_all_tokens_to_one_expert(ranks: Ranks, forced: Reference, tp: int, ep: int, dp_attention: int) -> None:
    plan = ParallelPlan.of(forced.config, tp=tp, ep=ep, dp_attention=dp_attention)
    lives = forced.check(ranks, plan)
    steps = [step for part in PARTS[:dp_attention] for step in part]
    num_tokens = sum(count for chunks, _ in steps for _, _, count in chunks)
    num_last = sum(sum(last_lens(chunks, rows)) for chunks, rows in steps)
    for shard, life in zip(plan.shards(forced.config), lives, strict=True):
        holds = 5 in shard.own_experts(0)
        expected = (num_tokens, num_tokens, num_last) if holds else (0, 0, 0)
        assert life.expert_tokens == tuple((0, 0, 0, 0, 0, count, 0) for count in expected)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("tp", "pp", "ep", "dp_attention"), DEGREES)
def test_every_rank_reads_the_bytes_of_its_own_experts(
    tmp_path: Path, references: dict[str, Reference], name: str, tp: int, pp: int, ep: int, dp_attention: int
) -> None:
    config = references[name].config
    state = torch.load(references[name].path)
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    for shard in ParallelPlan.of(config, tp=tp, pp=pp, ep=ep, dp_attention=dp_attention).shards(config):
        model = registry.build(config, shard, Groups(shard, CPU), CPU, torch.float32, max_len=8)
        checkpoint = open_checkpoint(tmp_path, config, torch.float32)
        model.load(checkpoint)
        checkpoint.check_extra(shard.layers)
        own = sum(parameter.nbytes for parameter in model.parameters())
        assert own <= checkpoint.bytes_read <= 1.05 * own
