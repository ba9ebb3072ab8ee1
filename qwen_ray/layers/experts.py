"""The experts of one layer that lie on this rank: a slot for each, or for its part where experts are cut.

Knows its own weights, reads and computes them, counts their tokens, and passes them on when experts change places.
Which tokens come, and from where, is `exchange.py`'s.
"""

from __future__ import annotations

import torch
from torch import nn

from qwen_ray.core.model_config import ModelConfig
from qwen_ray.kernels.layer import ExpertWeights
from qwen_ray.layers.checkpoint import Checkpoint
from qwen_ray.layers.expert_map import ExpertMap, Slots, Transfer, in_rounds, settle, transfers
from qwen_ray.layers.matrix import MatrixStack, layer_bits
from qwen_ray.layers.site import Site


class Experts(nn.Module):
    """`gate_up` [S, 2 I, hidden] and `down` [S, hidden, I], I being this rank's part of every expert's inner size."""

    def __init__(self, config: ModelConfig, site: Site, layer: int) -> None:
        super().__init__()
        assert config.moe is not None, "a dense model has no experts"
        shard = site.shard
        assert shard.experts is not None, "the plan of a model with experts places them"
        self.num_experts = config.moe.num_experts
        self.ep_rank = shard.ep_rank
        self._matrix = (config.moe.moe_intermediate_size, config.hidden_size)
        self._span = shard.expert_intermediate
        self._expert_tp = (shard.expert_tp_rank, shard.expert_tp_size)
        self._group = site.groups.stage
        self._run_experts = site.kernels.run_experts
        num_slots = len(shard.own_experts(layer))
        self.gate_up = MatrixStack(site, num_slots, 2 * len(self._span), config.hidden_size, layer_bits(site))
        self.down = MatrixStack(site, num_slots, config.hidden_size, len(self._span), layer_bits(site))
        # By expert id; behind them those of no expert here.
        self._tokens = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=site.device)
        self._one = torch.ones(1, dtype=torch.int64, device=site.device)
        self._take_up(shard.experts.slots[layer])

    def _take_up(self, slots: Slots) -> None:
        device = self._tokens.device
        self.map = ExpertMap.of(slots, self.num_experts, device)
        self._ids = torch.tensor([*slots[self.ep_rank], self.num_experts], device=device)

    def forward(self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[N, hidden] to [N, hidden]: what this rank adds for tokens that go to its `slots` [N, k], -1 being none.

        Slots of any integer type, weights [N, k] float32.
        """
        ids = self._ids[slots].flatten()
        self._tokens.scatter_add_(0, ids, self._one.expand_as(ids))
        return self._run_experts(x, slots, weights, self.gate_up.held, self.down.held)

    @property
    def weights(self) -> ExpertWeights:
        """As they lie until experts move."""
        return ExpertWeights(
            gate_up=self.gate_up.held,
            down=self.down.held,
            places=self.map.places,
            num_copies=self.map.num_copies,
            first_place=self.ep_rank * self.map.width,
            ids=self._ids,
            tokens=self._tokens,
        )

    def tokens(self) -> tuple[int, ...]:
        """By expert id: how many tokens this rank has computed it for. Waits for the device."""
        return tuple(self._tokens[:-1].tolist())

    def load(self, checkpoint: Checkpoint, prefix: str) -> None:
        """`prefix` is the module that holds them all: `model.layers.0.mlp.experts`."""
        inner, hidden = self._matrix
        for slot, expert in enumerate(self.map.slots[self.ep_rank]):
            for start, part in ((0, "gate_proj"), (len(self._span), "up_proj")):
                name = f"{prefix}.{expert}.{part}.weight"
                self.gate_up.take(slot, start, checkpoint, name, (inner, hidden), rows=self._span)
            self.down.take(
                slot, 0, checkpoint, f"{prefix}.{expert}.down_proj.weight", (hidden, inner), columns=self._span
            )

    def move(self, slots: Slots) -> int:
        """Hold the experts of `slots` from now on; returns how many came. All ranks of the stage do this together.

        An expert that stays keeps its slot, so the order within a rank may differ from that of `slots`. Holds what
        comes in beside the weights until all has been given.
        """
        wanted = settle(self.map.slots, slots)
        tensors = (*self.gate_up.tensors, *self.down.tensors)
        incoming: list[tuple[int, list[torch.Tensor]]] = []
        for turn in in_rounds(transfers(self.map.slots, wanted)):
            taken = [self._pass_on(tensor, turn) for tensor in tensors]
            incoming += [(t.target_slot, [part[0] for part in taken]) for t in turn if t.target == self.ep_rank]
        for slot, parts in incoming:
            for tensor, part in zip(tensors, parts, strict=True):
                tensor[slot].copy_(part)
        self._take_up(wanted)
        return len(incoming)

    def _pass_on(self, matrices: torch.Tensor, turn: list[Transfer]) -> torch.Tensor:
        """Give one matrix, or what it is made of, or none; take one or none: [1 or 0, ...]. Parts go to ranks with the
        same part."""
        expert_tp_rank, expert_tp_size = self._expert_tp
        counts = [0] * self._group.size
        given = matrices[:0]
        for transfer in turn:
            if transfer.source == self.ep_rank:
                given = matrices[transfer.source_slot : transfer.source_slot + 1]
                counts[transfer.target * expert_tp_size + expert_tp_rank] = 1
        taken, _ = self._group.all_to_all(given, counts)
        return taken
