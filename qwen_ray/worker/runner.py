"""One step on one rank: take in what changed, run this rank's layers, sample where that is this rank's part.

Knows the order of things. Threads, memory and counters are `worker.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qwen_ray.core.step import StepBatch, StepResult
from qwen_ray.grammar.matcher import GrammarCompiler
from qwen_ray.layers.batch import ForwardBatch
from qwen_ray.models.stage import Stage
from qwen_ray.worker.grammars import GrammarMasks
from qwen_ray.worker.pooling import embed, score
from qwen_ray.worker.prepare import prepare
from qwen_ray.worker.sampler import describe_prompts, sample
from qwen_ray.worker.sequences import SequenceTable


class Runner:
    """Owns the rank's sequences. `model` has its weights and its KV cache, and may have run before.

    `compiler` gives one for grammars, once it is there, on a rank that samples. Where that is None, sequences that have
    a grammar end with an error. `hidden` gives what the model's does.
    """

    def __init__(
        self,
        model: Stage,
        *,
        block_size: int,
        device: torch.device,
        compiler: Callable[[], GrammarCompiler | None] = lambda: None,
        hidden: Callable[[ForwardBatch], torch.Tensor | None] | None = None,
    ) -> None:
        self._model = model
        self._hidden = hidden or model.hidden
        self._block_size = block_size
        self._device = device
        self._sequences = SequenceTable()
        self._grammars = GrammarMasks(compiler)
        self._expert_tokens = model.expert_tokens()  # before this runner

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> StepResult | None:
        """The step's result on the rank that samples, None on the others.

        Where dp ranks share experts, a rank without tokens of its own takes the step all the same: it computes for the
        others, who wait for it.
        """
        states = self._sequences.apply(batch)
        samples = self._model.shard.samples
        if not states and self._model.shard.dp_size == 1:
            return StepResult(step_id=batch.step_id) if samples else None
        prepared = prepare(batch.chunks, states, block_size=self._block_size, device=self._device)
        masks = self._grammars.start(prepared.samples if samples else ())
        hidden = self._hidden(prepared.forward)
        if hidden is None:
            return None
        num_logits = len(hidden) - len(prepared.embedded)
        logits = self._model.logits(hidden[:num_logits])
        if logits is None:
            return None
        prompts = describe_prompts(logits, prepared.prompts)
        num_own = num_logits - len(prepared.scored)
        rows = logits[list(prepared.sample_rows)] if prepared.prompts else logits[:num_own]
        sampled = sample(rows, prepared.samples, masks.result(), self._model.greatest) if prepared.samples else []
        scores = score(logits[num_own:], prepared.scored)
        return StepResult(
            step_id=batch.step_id,
            samples=(*sampled, *scores, *embed(hidden[num_logits:], prepared.embedded)),
            prompt_logprobs=tuple(prompts),
        )

    def forget(self) -> None:
        """All sequences: those who told of them will tell anew."""
        self._sequences = SequenceTable()

    def expert_tokens(self) -> tuple[tuple[int, ...], ...]:
        """As `RankStats.expert_tokens`; from any thread."""
        counts = zip(self._model.expert_tokens(), self._expert_tokens, strict=True)
        return tuple(tuple(now - before for now, before in zip(*layer, strict=True)) for layer in counts)
