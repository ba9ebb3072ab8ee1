"""The wire format between an engine and its ranks: ints only, differences only.

Ranks keep, for every sequence they know, its token ids, its block table and its sampling parameters. A `StepBatch`
carries what changed. The ranks of a dp rank get the same part of it and take their own from their `Shard`; the one
among them that samples answers with a `StepResult`. Ranks whose part is empty take the step too: experts are shared.

Order inside a step: `dropped`, then `new`, then the chunks' `new_tokens` and `new_blocks`, then the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen_ray.core.pooling import Pooling
from qwen_ray.core.request import SamplingParams, TokenLogprobs

# Prompt tokens of one step that are to be described (`prompt_logprobs`). Each takes a row of logits, which at 152,064
# words is 0.6 MB: without a bound a single request could ask for gigabytes that nobody planned.
MAX_PROMPT_LOGITS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSequence:
    """A sequence that the ranks do not know yet (new, or back after a preemption).

    `token_ids` is everything known: the prompt, then `len(token_ids) - num_prompt_tokens` generated ones.
    """

    sequence_id: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...]  # masked until sampling.min_tokens are out
    dp_rank: int = 0
    pooling: Pooling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens `[start, start + count)` of one sequence, to be computed in this step.

    A chunk that reaches the last known token is sampled from, or pooled; a rank sees that for itself.
    `new_tokens` are appended to the sequence's ids, `new_blocks` to its block table, before it runs.
    """

    sequence_id: int
    start: int
    count: int
    new_tokens: tuple[int, ...] = ()
    new_blocks: tuple[int, ...] = ()
    dp_rank: int = 0  # that of the sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    step_id: int
    chunks: tuple[Chunk, ...]
    new: tuple[NewSequence, ...] = ()
    dropped: tuple[int, ...] = ()  # sequence ids to forget: finished, aborted, preempted

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    def part(self, dp_rank: int) -> StepBatch:
        """What the ranks of one dp rank are told. Of `dropped`, an id that they never knew does no harm."""
        return StepBatch(
            step_id=self.step_id,
            chunks=tuple(chunk for chunk in self.chunks if chunk.dp_rank == dp_rank),
            new=tuple(new for new in self.new if new.dp_rank == dp_rank),
            dropped=self.dropped,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The token chosen for one sequence. `error` (non-finite logits, say) ends that sequence and no other.

    Of one with `pooling` no token is chosen, `pooled` is what it asks for: little-endian float32.
    """

    sequence_id: int
    token_id: int = 0
    logprobs: TokenLogprobs | None = None
    error: str | None = None
    pooled: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs:
    """Log-probabilities of prompt tokens `[start, start + len(entries))`; there are none for token 0."""

    sequence_id: int
    start: int
    entries: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    step_id: int
    samples: tuple[Sample, ...] = ()
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    seconds: float = 0.0  # the sampling rank's own time in the step

    @classmethod
    def joined(cls, parts: Sequence[StepResult]) -> StepResult:
        """One step's results of all dp ranks as one; the slowest tells the time."""
        return cls(
            step_id=parts[0].step_id,
            samples=tuple(sample for part in parts for sample in part.samples),
            prompt_logprobs=tuple(entry for part in parts for entry in part.prompt_logprobs),
            seconds=max(part.seconds for part in parts),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveExperts:
    """New slots of one layer, to be taken up by all ranks between the same two steps; see `plan.ExpertPlacement`."""

    layer: int
    slots: tuple[tuple[int, ...], ...]
