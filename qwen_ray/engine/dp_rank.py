"""One dp rank as the scheduler sees it: its blocks, who runs on it, and its part of the step being made.

Attention is data-parallel over dp ranks: a sequence is computed, and its blocks lie, on one of them for as long as it
stays. Knows how one sequence gets its tokens and blocks here. Which sequence comes when, and to which dp rank, is the
scheduler's.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.step import MAX_PROMPT_LOGITS, Chunk
from qwen_ray.engine.block_pool import BlockPool
from qwen_ray.engine.company import Company
from qwen_ray.engine.sequence import Sequence

by_turn = attrgetter("turn")


@dataclass(slots=True, kw_only=True)
class Budget:
    """What is left of a dp rank's part of a step while it is being made."""

    num_tokens: int
    num_prompt_logits: int = MAX_PROMPT_LOGITS

    def of(self, seq: Sequence) -> int:
        """How many of its uncomputed tokens still fit."""
        limit = min(self.num_tokens, self.num_prompt_logits) if seq.wants_prompt_logprobs else self.num_tokens
        return min(limit, seq.num_uncomputed)

    def spend(self, seq: Sequence, count: int) -> None:
        self.num_tokens -= count
        if seq.wants_prompt_logprobs:
            self.num_prompt_logits -= count


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """That a dp rank could take a sequence now. `hits` are its blocks that hold the sequence's beginning already.

    `load`, in blocks: those in use there, and those of the sequence that would have to be computed. So it follows its
    prefix, unless more is going on there than computing the prefix again would be: a step takes as long as its busiest
    dp rank, and where all prompts begin with the same words, following them alone would leave the others idle.
    """

    dp_rank: DpRank
    hits: list[int]
    load: int


class DpRank:
    def __init__(self, number: int, config: EngineConfig) -> None:
        self.number = number
        self.pool = BlockPool(config.num_blocks)
        self.running: list[Sequence] = []  # by turn; those that the ranks know and that hold blocks
        self._config = config
        self._budget = Budget(num_tokens=0)
        self._num_steps = 0

    def ready(self, company: Company, *, is_alone: bool) -> Iterator[tuple[Sequence, int]]:
        """Begins a step: who runs and has something to compute, and how many tokens of it now fit.

        Of those who are not set aside, or of the one who is: no two of them are on the ranks at once.

        Decodes come first, so that no prefill delays a next token.

        With several steps in flight each takes its share of the decodes, or the first would take them all and leave
        the pipeline nothing.
        """
        self._num_steps += 1
        self._budget = Budget(num_tokens=company.num_tokens)
        share = -(-len(self.running) // self._config.depth)
        members = [seq for seq in self.running if seq.is_set_aside is is_alone]
        decodes = [seq for seq in members if seq.num_uncomputed == 1]
        prefills = [seq for seq in members if seq.num_uncomputed > 1]
        for seq in company.decodes(decodes, share) + company.prefills(prefills):
            if seq.is_on_ranks and (count := self._budget.of(seq)):  # not preempted by one before it
                yield seq, count

    def num_missing(self, seq: Sequence, count: int) -> int:
        """Blocks that its next `count` tokens need beyond those it has."""
        return self._num_blocks_of(seq.num_computed + count) - len(seq.block_table)

    def room(self, seq: Sequence) -> Room | None:
        """For all its tokens, in the step being made; None while there is none."""
        hits = self._place(seq) if self._budget.of(seq) else None
        if hits is None:
            return None
        num_blocks = self._num_blocks_of(seq.num_tokens)
        return Room(dp_rank=self, hits=hits, load=self.num_used_blocks + num_blocks - len(hits))

    def has_place(self, seq: Sequence) -> bool:
        """In some step."""
        return self._place(seq) is not None

    def _place(self, seq: Sequence) -> list[int] | None:
        """Its hits, if it could be admitted."""
        num_running = len(self.running)
        if num_running >= self._config.max_num_seqs:
            return None
        hits = self._hits(seq)
        # One block to spare for each running sequence, or its next token would preempt what was just admitted; and
        # whoever was preempted in this step would come straight back for the blocks it has just given up.
        if self.pool.cost(hits, self._num_blocks_of(seq.num_tokens)) + num_running > self.pool.num_free:
            return None
        return hits

    def admit(self, seq: Sequence, hits: list[int], sequence_id: int) -> int:
        """Let it run here, where `room` has found `hits`; how many of its tokens now fit."""
        self.pool.share(hits)
        seq.block_table = hits + self.pool.allocate(self._num_blocks_of(seq.num_tokens) - len(hits))
        seq.num_registered = len(hits)
        seq.num_computed = len(hits) * self._config.block_size
        seq.num_known = seq.num_tokens
        seq.sequence_id = sequence_id
        seq.dp_rank = self.number
        insort(self.running, seq, key=by_turn)
        return self._budget.of(seq)

    def advance(self, seq: Sequence, count: int, new_blocks: list[int]) -> Chunk:
        """Its next `count` tokens as a chunk; from here on they count as computed."""
        start = seq.num_computed
        self._budget.spend(seq, count)
        chunk = Chunk(
            sequence_id=seq.sequence_id,
            start=start,
            count=count,
            new_tokens=tuple(seq.token_ids[seq.num_known :]),
            new_blocks=tuple(new_blocks),
            dp_rank=self.number,
        )
        seq.num_computed = start + count
        seq.num_known = seq.num_tokens
        seq.last_step = self._num_steps
        num_full = seq.num_computed // self._config.block_size
        if num_full > seq.num_registered and self._config.enable_prefix_caching:
            hashes = seq.hashes(num_full, self._config.block_size)
            for i in range(seq.num_registered, num_full):
                self.pool.register(seq.block_table[i], hashes[i])
            seq.num_registered = num_full
        return chunk

    def leave(self, seq: Sequence) -> None:
        """Take it off the ranks, and its blocks back."""
        self.running.remove(seq)
        self.pool.release(seq.block_table)
        seq.leave_ranks()

    def clear(self) -> list[Sequence]:
        """All K and V are lost: those that ran here, now off the ranks."""
        left, self.running = self.running, []
        for seq in left:
            seq.leave_ranks()
        self.pool.clear()
        return left

    @property
    def num_used_blocks(self) -> int:
        return self.pool.num_blocks - self.pool.num_free

    def _hits(self, seq: Sequence) -> list[int]:
        """Blocks that hold its beginning already. The last token is always computed: it is what is sampled from."""
        if not self._config.enable_prefix_caching or seq.wants_prompt_logprobs:
            return []
        block_size = self._config.block_size
        return self.pool.match(seq.hashes((seq.num_tokens - 1) // block_size, block_size))

    def _num_blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.block_size)
