"""What every architecture shares: one rank's run of layers, with the embedding before and the head behind.

Knows which part of the model this rank holds, and hands hidden states to the next. What a layer is, the architecture's
own page says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import nn

from qwen_ray.core.model_config import ModelConfig
from qwen_ray.layers.attention import Attention
from qwen_ray.layers.batch import ForwardBatch, LayerWeights, Places
from qwen_ray.layers.checkpoint import Checkpoint
from qwen_ray.layers.embedding import Embedding, Head, VocabMatrix
from qwen_ray.layers.expert_map import Slots
from qwen_ray.layers.matrix import Matrix, MatrixStack
from qwen_ray.layers.mlp import Mlp
from qwen_ray.layers.moe import Moe
from qwen_ray.layers.norm import RMSNorm
from qwen_ray.layers.rotary import Rotary
from qwen_ray.layers.site import Site


class DecoderLayer(nn.Module):
    """One layer of an architecture. Its attributes are named as in the checkpoint, and each can load itself."""

    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    mlp: nn.Module

    @property
    def weights(self) -> LayerWeights:
        return LayerWeights(
            attention_norm=self.input_layernorm.weight,
            attention=self.self_attn.weights,
            mlp_norm=self.post_attention_layernorm.weight,
            mlp=cast(Mlp | Moe, self.mlp).weights,
        )

    def load(self, checkpoint: Checkpoint, prefix: str) -> None:
        for name, part in self.named_children():
            cast(Loads, part).load(checkpoint, f"{prefix}.{name}")


class Loads(Protocol):
    def load(self, checkpoint: Checkpoint, prefix: str) -> None: ...


class Stage(nn.Module):
    """One rank's part of a causal language model. `layers` are those of `shard.layers`."""

    def __init__(
        self,
        config: ModelConfig,
        site: Site,
        max_len: int,
        make_layer: Callable[[ModelConfig, Site, int], DecoderLayer],
    ) -> None:
        super().__init__()
        self.config = config
        self.shard = shard = site.shard
        self._groups = site.groups
        self._plan_attention = site.kernels.plan_attention
        self._plan_decodes = site.kernels.plan_decodes
        self.greatest = site.kernels.greatest
        self._dtype = site.dtype
        vocab, hidden = config.vocab_size, config.hidden_size
        self.embed_tokens = Embedding(site, vocab, hidden) if shard.is_first else None
        self.layers = nn.ModuleList(make_layer(config, site, i) for i in shard.layers)
        self._at_once = site.kernels.of_layers if shard.tp_size == shard.dp_size == 1 else None
        self.rotary = Rotary(site, config.rope, config.head_dim, max_len)
        self.norm = RMSNorm(site, hidden, config.rms_norm_eps) if shard.is_last else None
        tied = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = Head(site, tied or VocabMatrix(site, vocab, hidden)) if shard.is_last else None

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> torch.Tensor | None:
        """Logits [L, vocabulary] in float32 on the rank that samples, None on the others."""
        x = self.hidden(batch)
        logits = None if x is None else self.logits(x)
        return None if logits is None else logits.float()

    @torch.inference_mode()
    def hidden(self, batch: ForwardBatch, plan: Any = None) -> torch.Tensor | None:
        """Hidden states [L, hidden] behind the final norm, the same on all ranks of the last stage, None on others.

        A model with experts needs every rank in every step, also one whose batch is empty. `plan` is one of
        `plan_decodes`, for a batch of one token for each sequence.
        """
        if self.embed_tokens is not None:
            x = self.embed_tokens(batch.token_ids)
        else:
            x = self._groups.receive((batch.num_tokens, self.config.hidden_size), self._dtype)
        x = self._through_layers(x, batch, plan)
        if self.norm is None:
            self._groups.send(x)
            return None
        return self.norm(x[batch.logit_rows])

    @torch.inference_mode()
    def logits(self, x: torch.Tensor) -> torch.Tensor | None:
        """Of some rows of `hidden`, on all ranks of the last stage together; as `forward`, in the model's dtype."""
        assert self.lm_head is not None, "on the last stage"
        return self.lm_head(x)

    @property
    def plans_decodes(self) -> bool:
        return self._plan_decodes is not None

    def plan_decodes(self, block_tables: torch.Tensor, max_context: int) -> Any:
        """For `hidden`; see `Kernels`."""
        assert self._plan_decodes is not None, "asked before"
        return self._plan_decodes(block_tables, max_context, self._block_size)

    def _through_layers(self, x: torch.Tensor, batch: ForwardBatch, plan: Any) -> torch.Tensor:
        """[T, hidden] to [R, hidden] on the last stage, [T, hidden] on others. x may be changed."""
        cos, sin = self.rotary(batch.positions)
        plan = self._plan(batch, batch.query_lens) if plan is None else plan
        places = Places(cos=cos, sin=sin, slots=batch.slots, rows=None, positions=batch.positions, plan=plan)
        last = self._last_places(batch, places) if self.shard.is_last else places
        if self._at_once is not None and x.shape[0] and self._at_once.takes(x):
            return self._at_once.layers(x, self._prepared_layers, places, last)
        for layer in self.layers[:-1]:
            x = layer(x, places)
        return self.layers[-1](x, last)

    @cached_property
    def _prepared_layers(self) -> Any:
        """From the first step on: weights and KV caches stay where they are, unless experts move."""
        assert self._at_once is not None, "asked for by `_through_layers` alone"
        return self._at_once.prepare_layers([cast(DecoderLayer, layer).weights for layer in self.layers])

    def _last_places(self, batch: ForwardBatch, places: Places) -> Places:
        """Of the model's last layer."""
        rows = batch.last_rows
        if rows is None:
            return places
        return replace(places, rows=rows, positions=batch.positions[rows], plan=self._plan(batch, batch.last_lens))

    def _plan(self, batch: ForwardBatch, query_lens: tuple[int, ...]) -> Any:
        """For the last `query_lens` tokens of each sequence."""
        if not any(query_lens):
            return None
        tables, context_lens = batch.block_tables, batch.context_lens
        if not all(query_lens):
            asking = [s for s, count in enumerate(query_lens) if count]
            tables = tables[asking]
            query_lens, context_lens = (tuple(lens[s] for s in asking) for lens in (query_lens, context_lens))
        return self._plan_attention(tables, query_lens, context_lens, self._block_size)

    @property
    def _block_size(self) -> int:
        return self.attentions[0].kv_cache[0].shape[1]

    @torch.inference_mode()
    def load(self, checkpoint: Checkpoint) -> None:
        """Fill every weight. Raises CheckpointError."""
        if self.embed_tokens is not None:
            self.embed_tokens.load(checkpoint, "model.embed_tokens")
        for i, layer in zip(self.shard.layers, self.layers, strict=True):
            cast(DecoderLayer, layer).load(checkpoint, f"model.layers.{i}")
        if self.norm is not None:
            self.norm.load(checkpoint, "model.norm")
        if self.lm_head is not None and self.lm_head.matrix is not self.embed_tokens:
            self.lm_head.load(checkpoint, "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head")

    @property
    def attentions(self) -> list[Attention]:
        """This rank's attention layers in order: each wants its `kv_cache` set."""
        return [cast(DecoderLayer, layer).self_attn for layer in self.layers]

    @torch.inference_mode()
    def move_experts(self, layer: int, slots: Slots) -> int:
        """Let the experts of `layer` lie as `slots` says, by expert rank; returns how many came to this rank.

        All ranks of the stage that holds the layer do this between the same two steps; on others nothing happens.
        """
        moe = self._moe(layer) if layer in self.shard.layers else None
        self.__dict__.pop("_prepared_layers", None)
        return 0 if moe is None else moe.experts.move(slots)

    def expert_tokens(self) -> tuple[tuple[int, ...], ...]:
        """Of each layer here, by expert id: how many tokens were computed here; () for a dense one.

        Waits for the device.
        """
        found = [self._moe(layer) for layer in self.shard.layers]
        return tuple(() if moe is None else moe.experts.tokens() for moe in found)

    def expert_slots(self) -> dict[int, Slots]:
        """Of each sparse layer here: where its experts lie now."""
        found = {layer: self._moe(layer) for layer in self.shard.layers}
        return {layer: moe.experts.map.slots for layer, moe in found.items() if moe is not None}

    def _moe(self, layer: int) -> Moe | None:
        mlp = cast(DecoderLayer, self.layers[layer - self.shard.layers.start]).mlp
        return mlp if isinstance(mlp, Moe) else None

    @property
    def num_weights(self) -> int:
        """That `load` reads, however they are then held."""
        packed = [m.packed for m in self.modules() if isinstance(m, Matrix | MatrixStack) and m.packed is not None]
        held = sum(parameter.numel() for parameter in self.parameters())
        return held + sum(p.num_weights - sum(tensor.numel() for tensor in p.tensors) for p in packed)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights and tables held; what is shared counts once. KV caches are the worker's."""
        tensors = [*self.parameters(), *self.buffers()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())
