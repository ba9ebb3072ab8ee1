"""Ranks without tensors that hold the engine to its word.

A token's "K and V" are a hash of its whole context, kept per slot. The next token is drawn from the hash that is read
*out of the slots*, so whoever shares, frees or overwrites a block wrongly fails at once. Every rule of the wire format
is asserted. Each dp rank has slots and sequences of its own, as real ones have: a chunk on another than its sequence's
finds nobody, and a block of another dp rank holds the wrong K and V. Some sequences kill them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from qwen_ray.core.errors import RankFailed
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.pooling import Pooling
from qwen_ray.core.request import GenerateRequest, SamplingParams, TokenLogprobs
from qwen_ray.core.step import Chunk, NewSequence, PromptLogprobs, Sample, StepBatch, StepResult

VOCAB_SIZE = 50
# Seeds of sequences that something is wrong with.
POISON = 13  # its second token comes out non-finite
LETHAL = 66  # whatever is computed of it kills the ranks
LETHAL_LATER = 67  # its third token does
LETHAL_DECODE = 68  # its third token, and any later one, does unless it comes from a prefill


def extend(context: int, token: int) -> int:
    return hash((context, token))


def context_of(token_ids: list[int]) -> int:
    context = 0
    for token in token_ids:
        context = extend(context, token)
    return context


def draw(context: int, seed: int, masked: tuple[int, ...]) -> int:
    token = hash((context, seed)) % VOCAB_SIZE
    while token in masked:
        token = (token + 1) % VOCAB_SIZE
    return token


def masked(num_output_tokens: int, sampling: SamplingParams, stop_token_ids: tuple[int, ...]) -> tuple[int, ...]:
    return stop_token_ids if num_output_tokens < sampling.min_tokens else ()


def pooled(context: int, pooling: Pooling) -> bytes:
    return f"{context} {pooling.token_ids}".encode()


def alone(request: GenerateRequest, config: EngineConfig) -> tuple[list[int], str]:
    """What a request must give: all output tokens and the finish reason, by definition and not by scheduling."""
    prompt, output = list(request.prompt_token_ids), list(request.output_token_ids)
    max_len = min(config.max_model_len, config.num_kv_tokens + 1)
    max_tokens = request.sampling.max_tokens or max_len
    if request.pooling is not None:
        return output, "error" if request.seed == LETHAL else "stop"
    while True:
        if (request.seed, len(output)) in ((POISON, 1), (LETHAL_LATER, 2)) or request.seed == LETHAL:
            return output, "error"
        context = context_of(prompt + output)
        mask = masked(len(output), request.sampling, request.stop_token_ids)
        output.append(draw(context, request.seed, mask))
        if output[-1] in request.stop_token_ids and len(output) >= request.sampling.min_tokens:
            return output, "stop"
        if len(output) >= max_tokens or len(prompt) + len(output) >= max_len:
            return output, "length"


@dataclass
class Known:
    new: NewSequence
    token_ids: list[int]
    table: list[int] = field(default_factory=list)
    num_computed: int | None = None  # None until the first chunk says how much was hit


class FakeRanks:
    """All dp ranks of a group."""

    def __init__(self, config: EngineConfig) -> None:
        self.dp_ranks = [FakeRank(config) for _ in range(config.dp_attention)]
        self.step_id = 0
        self.num_computed_tokens = 0
        self.batches: list[StepBatch] = []
        self.are_dead = False

    def restart(self) -> None:
        """As after a repair: no K and V, no sequences."""
        self.are_dead = False
        for dp_rank in self.dp_ranks:
            dp_rank.restart()

    def execute(self, batch: StepBatch) -> StepResult:
        """Raises RankFailed when they die of it, and from then on until `restart`."""
        assert batch.step_id > self.step_id, "steps out of order"
        assert batch.chunks, "an empty step"
        if self.are_dead:
            raise RankFailed(0, "dead already")
        known = [sequence_id for dp_rank in self.dp_ranks for sequence_id in dp_rank.known]
        assert len(set(batch.dropped)) == len(batch.dropped), "dropped twice"
        assert set(batch.dropped) <= set(known), "dropped, but not known"
        assert not {new.sequence_id for new in batch.new} & set(known), "new, but known"
        self.step_id = batch.step_id
        self.num_computed_tokens += batch.num_tokens
        self.batches.append(batch)
        parts = [batch.part(number) for number in range(len(self.dp_ranks))]
        assert sum(len(part.chunks) + len(part.new) for part in parts) == len(batch.chunks) + len(batch.new)
        result = StepResult.joined([rank.execute(part) for rank, part in zip(self.dp_ranks, parts, strict=True)])
        self.are_dead = any(rank.is_killed_by(chunk) for rank in self.dp_ranks for chunk in batch.chunks)
        if self.are_dead:
            raise RankFailed(0, "killed by what it computed")
        return replace(result, seconds=0.001 * (1 + batch.num_tokens))  # every token takes its time, as on a CPU


class FakeRank:
    """One dp rank."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.restart()

    def restart(self) -> None:
        self.known: dict[int, Known] = {}
        self.slots: dict[int, int] = {}

    def execute(self, batch: StepBatch) -> StepResult:
        self._take_in(batch)
        written: set[int] = set()
        for chunk in batch.chunks:
            self._write(chunk, written)
        samples = [self._sample(chunk) for chunk in batch.chunks if self._is_sampled(chunk)]
        for chunk in batch.chunks:
            self._attend(chunk)
        logprobs = [part for chunk in batch.chunks if (part := self._prompt_logprobs(chunk)).entries]
        return StepResult(step_id=batch.step_id, samples=tuple(samples), prompt_logprobs=tuple(logprobs))

    def is_killed_by(self, chunk: Chunk) -> bool:
        seq = self.known.get(chunk.sequence_id)
        if seq is None:  # it is on another dp rank
            return False
        num_output = len(seq.token_ids) - seq.new.num_prompt_tokens
        return (
            seq.new.seed == LETHAL
            or (seq.new.seed == LETHAL_LATER and num_output == 2 and self._is_sampled(chunk))
            or (seq.new.seed == LETHAL_DECODE and num_output >= 2 and chunk.count == 1)
        )

    def _take_in(self, batch: StepBatch) -> None:
        assert batch.num_tokens <= self.config.max_num_batched_tokens, "batch too large"
        for sequence_id in batch.dropped:
            self.known.pop(sequence_id, None)
        for new in batch.new:
            assert new.sequence_id not in self.known, "twice new"
            assert 0 < new.num_prompt_tokens <= len(new.token_ids)
            self.known[new.sequence_id] = Known(new=new, token_ids=list(new.token_ids))
        assert len(self.known) <= self.config.max_num_seqs, "too many sequences"
        ids = [chunk.sequence_id for chunk in batch.chunks]
        assert len(set(ids)) == len(ids), "two chunks of one sequence"
        assert {new.sequence_id for new in batch.new} <= set(ids), "new, but without a chunk"

    def _write(self, chunk: Chunk, written: set[int]) -> None:
        seq = self.known[chunk.sequence_id]
        seq.token_ids += chunk.new_tokens
        seq.table += chunk.new_blocks
        end = chunk.start + chunk.count
        assert seq.num_computed in (None, chunk.start), "a gap or an overlap between chunks"
        assert chunk.count > 0
        assert end <= len(seq.token_ids), "tokens that nobody knows"
        assert all(0 <= block < self.config.num_blocks for block in seq.table), "no such block"
        assert len(set(seq.table)) == len(seq.table), "a block twice in one table"
        assert end <= len(seq.table) * self.config.block_size, "no block for a token"
        context = context_of(seq.token_ids[: chunk.start])
        for position in range(chunk.start, end):
            context = extend(context, seq.token_ids[position])
            slot = self._slot(seq, position)
            assert slot not in written, "one slot written twice in a step"
            written.add(slot)
            self.slots[slot] = context
        seq.num_computed = end

    def _attend(self, chunk: Chunk) -> None:
        seq, context = self.known[chunk.sequence_id], 0
        for position in range(chunk.start + chunk.count):
            context = extend(context, seq.token_ids[position])
            assert self.slots.get(self._slot(seq, position)) == context, f"wrong K and V at position {position}"

    def _sample(self, chunk: Chunk) -> Sample:
        seq = self.known[chunk.sequence_id]
        num_output = len(seq.token_ids) - seq.new.num_prompt_tokens
        if seq.new.seed == POISON and num_output == 1:
            return Sample(sequence_id=chunk.sequence_id, token_id=0, error="logits are not finite")
        mask = masked(num_output, seq.new.sampling, seq.new.stop_token_ids)
        context = self.slots[self._slot(seq, len(seq.token_ids) - 1)]
        if seq.new.pooling is not None:
            return Sample(sequence_id=chunk.sequence_id, pooled=pooled(context, seq.new.pooling))
        token = draw(context, seq.new.seed, mask)
        logprobs = None if seq.new.sampling.logprobs is None else TokenLogprobs(token_id=token, logprob=-1.0)
        return Sample(sequence_id=chunk.sequence_id, token_id=token, logprobs=logprobs)

    def _prompt_logprobs(self, chunk: Chunk) -> PromptLogprobs:
        seq = self.known[chunk.sequence_id]
        first = chunk.start + 1
        last = min(chunk.start + chunk.count, seq.new.num_prompt_tokens - 1)
        wanted = seq.new.sampling.prompt_logprobs is not None
        entries = [
            TokenLogprobs(token_id=seq.token_ids[i], logprob=-float(i)) for i in range(first, last + 1) if wanted
        ]
        return PromptLogprobs(sequence_id=chunk.sequence_id, start=first, entries=tuple(entries))

    def _is_sampled(self, chunk: Chunk) -> bool:
        return chunk.start + chunk.count == len(self.known[chunk.sequence_id].token_ids)

    def _slot(self, seq: Known, position: int) -> int:
        block, offset = divmod(position, self.config.block_size)
        return seq.table[block] * self.config.block_size + offset


class FakeExecutor:
    """Runs steps when they are submitted, answers `latency` turns of the event loop later, and fails when told to."""

    def __init__(self, config: EngineConfig, *, latency: int = 1) -> None:
        self.ranks = FakeRanks(config)
        self.latency = latency
        self.num_inflight = 0
        self.max_inflight = 0
        self.fail_at: set[int] = set()
        self.on_submit: Callable[[StepBatch], None] = lambda _: None

    def submit(self, batch: StepBatch) -> Awaitable[StepResult]:
        self.num_inflight += 1
        self.max_inflight = max(self.max_inflight, self.num_inflight)
        result: StepResult | RankFailed
        try:
            result = self.ranks.execute(batch)
        except RankFailed as failure:
            result = failure
        self.on_submit(batch)
        return self._answer(batch, result)

    async def _answer(self, batch: StepBatch, result: StepResult | RankFailed) -> StepResult:
        for _ in range(self.latency):
            await asyncio.sleep(0)
        self.num_inflight -= 1
        if isinstance(result, RankFailed):
            raise result
        if batch.step_id in self.fail_at:
            raise RankFailed(1, "killed by the test")
        return result
