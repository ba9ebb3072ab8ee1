"""A layer's sparse MLP: a router, experts spread over the ranks of the stage, and perhaps a shared expert.

Shazeer et al. 2017; shared experts as in DeepSeekMoE (Dai et al. 2024). Names are those of Qwen's checkpoints.
"""

from __future__ import annotations

import torch
from torch import nn

from qwen_ray.core.model_config import ModelConfig
from qwen_ray.core.plan import split_evenly
from qwen_ray.kernels.layer import MoeWeights
from qwen_ray.layers.checkpoint import Checkpoint
from qwen_ray.layers.exchange import dispatch
from qwen_ray.layers.experts import Experts
from qwen_ray.layers.linear import ReplicatedLinear
from qwen_ray.layers.mlp import Mlp
from qwen_ray.layers.site import Site


class Moe(nn.Module):
    """Every rank of the stage has to call it in every step, also one without tokens.

    With one dp rank all ranks see all tokens, and each computes its own experts of all of them. With several, the
    tensor ranks of a dp rank divide its tokens among themselves and dispatch them to the ranks that hold their experts.
    """

    def __init__(self, config: ModelConfig, site: Site, layer: int) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None, "a dense model has no experts"
        hidden, shared = config.hidden_size, moe.shared_expert_intermediate_size
        self._top_k = moe.num_experts_per_tok
        self._renormalize = moe.norm_topk_prob
        self._route = site.kernels.route
        self._at_once = site.kernels.of_layers if site.shard.dp_size == 1 and site.shard.own_experts(layer) else None
        self._shard = site.shard
        self._groups = site.groups
        self.gate = ReplicatedLinear(site, hidden, moe.num_experts)
        self.experts = Experts(config, site, layer)
        self.shared_expert = Mlp(site, hidden, shared, site.shard.shared_intermediate) if shared else None
        self.shared_expert_gate = ReplicatedLinear(site, hidden, 1) if shared else None

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[T, hidden] to [T, hidden]; positions [T] of the tokens in their sequences."""
        if self._at_once is not None and x.shape[0] and self._at_once.takes(x):
            return self._groups.tensor.all_reduce(self._at_once.moe(x, self.weights, positions))
        out = self._routed(x, positions)
        if x.shape[0] == 0:
            return out
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            out += self.shared_expert_gate(x).sigmoid() * self.shared_expert.partial(x)
        return self._groups.tensor.all_reduce(out)

    @property
    def weights(self) -> MoeWeights:
        """As they lie until experts move."""
        shared = None
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            shared = self.shared_expert.weights, self.shared_expert_gate.weight
        return MoeWeights(
            router=self.gate.weight,
            top_k=self._top_k,
            renormalize=self._renormalize,
            experts=self.experts.weights,
            shared=shared,
        )

    def _routed(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """This rank's part of what the routed experts give."""
        if self._shard.dp_size == 1:
            places, weights = self._choose(x, positions)
            return self.experts(x, self.experts.map.slots_on(self._shard.ep_rank, places), weights)
        span = split_evenly(x.shape[0], self._shard.tp_size)[self._shard.tp_rank]
        own = slice(span.start, span.stop)
        places, weights = self._choose(x[own], positions[own])
        out = torch.zeros_like(x)
        out[own] = dispatch(x[own], places, weights, self.experts, self._groups.stage)
        return out

    def _choose(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of experts [T, k] and their weights [T, k]."""
        weights, ids = self._route(self.gate(x), self._top_k, self._renormalize)
        return self.experts.map.choose(ids, positions), weights

    def load(self, checkpoint: Checkpoint, prefix: str) -> None:
        self.gate.load(checkpoint, f"{prefix}.gate")
        self.experts.load(checkpoint, f"{prefix}.experts")
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            self.shared_expert.load(checkpoint, f"{prefix}.shared_expert")
            self.shared_expert_gate.load(checkpoint, f"{prefix}.shared_expert_gate")
