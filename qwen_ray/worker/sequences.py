"""What a rank remembers of the sequences that it was told about.

Knows ids, blocks and sampling parameters, as `core.step` describes them. Knows no tensors.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from qwen_ray.core.pooling import Pooling
from qwen_ray.core.request import SamplingParams
from qwen_ray.core.step import NewSequence, StepBatch
from qwen_ray.worker.grammar_place import GrammarPlace
from qwen_ray.worker.thinking import ThinkingBudget


class TokenCounts:
    """The different tokens of a sequence, and how often each was generated: what penalties are made of.

    `ids` are in the order of first appearance, `counts` beside them; a token of the prompt alone counts 0.
    """

    __slots__ = ("_index", "counts", "ids", "num_seen")

    def __init__(self) -> None:
        self.ids = array("q")
        self.counts = array("q")
        self.num_seen = 0  # tokens of the sequence that are counted in here
        self._index: dict[int, int] = {}

    def add(self, token_ids: Iterable[int], *, generated: bool) -> None:
        for token_id in token_ids:
            at = self._index.setdefault(token_id, len(self.ids))
            if at == len(self.ids):
                self.ids.append(token_id)
                self.counts.append(0)
            self.counts[at] += generated
            self.num_seen += 1


@dataclass(slots=True, kw_only=True)
class SequenceState:
    """One sequence on one rank; grows with its chunks. `blocks` is its block table."""

    sequence_id: int
    token_ids: array[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...]
    blocks: array[int]
    pooling: Pooling | None = None
    grammar_place: GrammarPlace | None = None
    _counts: TokenCounts | None = None
    _thinking: ThinkingBudget | None = None

    @classmethod
    def of(cls, new: NewSequence) -> SequenceState:
        return cls(
            sequence_id=new.sequence_id,
            token_ids=array("q", new.token_ids),
            num_prompt_tokens=new.num_prompt_tokens,
            sampling=new.sampling,
            seed=new.seed,
            stop_token_ids=new.stop_token_ids,
            blocks=array("q"),
            pooling=new.pooling,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def counts(self) -> TokenCounts:
        """Up to date; kept from the first time it is asked for, so that a step adds its own token only."""
        counts = self._counts
        if counts is None:
            counts = self._counts = TokenCounts()
            counts.add(self.token_ids[: self.num_prompt_tokens], generated=False)
        counts.add(self.token_ids[counts.num_seen :], generated=True)
        return counts

    @property
    def forced_token(self) -> int | None:
        """The next token, where the thinking budget and not the model says which; kept up to date as `counts` is."""
        thinking, budget = self.sampling.thinking, self.sampling.thinking_budget
        if thinking is None or budget is None:
            return None
        known = self._thinking
        if known is None:
            known = self._thinking = ThinkingBudget(thinking, budget)
        known.add(self.token_ids[self.num_prompt_tokens + known.num_seen :])
        return known.forced


class SequenceTable:
    """Every sequence of one rank, by id."""

    def __init__(self) -> None:
        self._states: dict[int, SequenceState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def apply(self, batch: StepBatch) -> list[SequenceState]:
        """Take in what changed, in the order of `core.step`; the states of the batch's chunks, in their order."""
        for sequence_id in batch.dropped:
            self._states.pop(sequence_id, None)
        for new in batch.new:
            self._states[new.sequence_id] = SequenceState.of(new)
        states = [self._states[chunk.sequence_id] for chunk in batch.chunks]
        for state, chunk in zip(states, batch.chunks, strict=True):
            state.token_ids.extend(chunk.new_tokens)
            state.blocks.extend(chunk.new_blocks)
        return states
