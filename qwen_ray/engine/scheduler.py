"""Which tokens of which sequences are computed in the next step, and what a step's result means for each.

There are no phases: a sequence gets `min(budget, num_tokens - num_computed)` tokens. One is a decode, many are a chunk
of a prefill, a prefix hit is a head start. One queue feeds all dp ranks: who is next, `queue.py` knows; what goes on
in each dp rank, `dp_rank.py`; who runs beside a light tenant, `company.py`; who must run alone, `suspects.py`. Knows
nothing of tasks, transport or processes; `engine.py` turns the handle.

Ranks run steps in the order in which they were scheduled, and within a layer write all K and V of a step before any
of its tokens attends. From that alone follows
  * that a block can be hit from the moment its computation is *scheduled*, even within the same step;
  * that blocks can be freed at any moment: a step in flight that still writes to them runs before any step that could
    give them to somebody else.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qwen_ray.core.errors import DEADLINE_EXCEEDED, RANKS_FAILED, InvalidRequest
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.request import FinishReason, GenerateRequest, TokenDelta
from qwen_ray.core.stats import EngineStats, RequestTimes
from qwen_ray.core.step import Chunk, NewSequence, Sample, StepBatch, StepResult
from qwen_ray.engine.company import Shares, StepTimes
from qwen_ray.engine.dp_rank import DpRank, Room
from qwen_ray.engine.queue import OUTPUT_COST, PROMPT_COST, Queue
from qwen_ray.engine.sequence import Sequence, longest
from qwen_ray.engine.sequence_heap import SequenceHeap
from qwen_ray.engine.suspects import MAX_BLAMED_TOGETHER, MAX_DEATHS_IN_COMPANY, Suspects


@dataclass(frozen=True, slots=True, kw_only=True)
class _InFlight:
    """Who is in a step whose result is still to come."""

    sequences: tuple[Sequence, ...]
    is_alone: bool


class Scheduler:
    """`on_finished` is told the times of every request that has ended. `clock` gives seconds since the epoch."""

    def __init__(
        self,
        config: EngineConfig,
        on_finished: Callable[[RequestTimes], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.dp_ranks = tuple(DpRank(number, config) for number in range(config.dp_attention))
        self._config = config
        self._on_finished = on_finished
        self._clock = clock
        self._by_request: dict[str, Sequence] = {}
        self._by_id: dict[int, Sequence] = {}  # running
        self._queue = Queue(config.max_num_waiting)
        self._suspects = Suspects(config.depth)
        self._times = StepTimes(config.light_tenant_slowdown)
        self._shares = Shares()
        self._deadlines = SequenceHeap()
        self._inflight: deque[_InFlight] = deque()
        self._dropped: list[int] = []  # to be told to the ranks with the next step
        self._deltas: list[TokenDelta] = []
        self._num_requests = 0
        self._num_admissions = 0
        self._num_scheduled_steps = 0
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0
        self._num_preemptions = 0
        self._num_overdue = 0
        self._num_poisonous = 0

    @property
    def is_idle(self) -> bool:
        return not self._by_request

    def add(self, request: GenerateRequest) -> None:
        """Queue it. Raises InvalidRequest, ContextLengthExceeded or Overloaded; then nothing has changed.

        The queue always takes what another replica has accepted before and begun: it must not get lost on its way.
        """
        max_len = longest(request, self._config)
        if request.request_id in self._by_request:
            raise InvalidRequest(f"request {request.request_id} is running already.", param="request_id")
        if not (request.output_token_ids or request.is_suspect):
            self._queue.check_room(request.tenant)
        now = self._clock()
        if self.is_idle:
            self._queue.pace.begin(now)
        seq = Sequence(request, number=self._num_requests, max_len=max_len, now=now)
        self._num_requests += 1
        self._by_request[request.request_id] = seq
        self._queue.know(seq)
        if request.deadline is not None:
            self._deadlines.push((request.deadline,), seq)
        if request.is_suspect:
            self._suspects.blame(seq, num_deaths=MAX_DEATHS_IN_COMPANY)
        self._wait(seq)
        if reason := seq.finish_reason:  # continued, but its owner missed that it had ended
            self._end(seq, reason)

    def abort(self, request_id: str) -> None:
        """End it, whatever it is doing; one that has ended before is none of our business."""
        if seq := self._by_request.get(request_id):
            self._end(seq, "abort")

    def schedule(self) -> StepBatch | None:
        """The next step; None while there is nothing to compute, or nothing that may run beside what is in flight."""
        self._end_overdue()
        if self._inflight and self._inflight[-1].is_alone:
            return None
        suspect = self._suspects.first
        if suspect is None:
            return self._make_step()
        if self._suspects.is_turn_of_others and (batch := self._make_step()):
            return batch
        if self._inflight:
            return None
        batch = self._make_step(suspect)
        self._suspects.has_room = batch is not None
        return batch or self._make_step()

    def update(self, batch: StepBatch, result: StepResult) -> list[TokenDelta]:
        """Take in a step's result; returns what there is to tell, ends since the last call included."""
        self._inflight.popleft()
        self._num_steps += 1
        self._times.took(batch.num_tokens, result.seconds)
        now = self._clock()
        samples = {sample.sequence_id: sample for sample in result.samples}
        for part in result.prompt_logprobs:
            if seq := self._by_id.get(part.sequence_id):
                seq.add_prompt_logprobs(part.start, part.entries)
        for chunk in batch.chunks:
            seq = self._by_id.get(chunk.sequence_id)
            if seq is not None and chunk.start + chunk.count == seq.num_tokens:
                self._append(seq, samples.get(chunk.sequence_id), now)
        return self.take_deltas()

    def take_deltas(self) -> list[TokenDelta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def reset(self, *, ranks_died: bool = False) -> None:
        """The ranks have lost all K and V: everything running waits again, as `prompt + tokens so far`.

        If they died, everybody in a step in flight is blamed. Who was set aside was alone in it, and ends.
        """
        lost = [seq for dp_rank in self.dp_ranks for seq in dp_rank.clear()]
        self._by_id.clear()
        self._shares.clear()
        self._dropped.clear()
        for seq in lost:
            self._wait(seq)
        inflight = dict.fromkeys(seq for step in self._inflight for seq in step.sequences)
        self._inflight.clear()
        if ranks_died:
            self._blame(inflight)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._by_id),
            num_waiting=len(self._by_request) - len(self._by_id),
            num_waiting_tokens=self._queue.num_tokens + self._suspects.num_waiting_tokens,
            num_set_aside=len(self._suspects),
            num_blocks=sum(dp_rank.pool.num_blocks for dp_rank in self.dp_ranks),
            num_used_blocks=sum(dp_rank.num_used_blocks for dp_rank in self.dp_ranks),
            num_cached_blocks=sum(dp_rank.pool.num_cached_free for dp_rank in self.dp_ranks),
            block_size=self._config.block_size,
            steps_total=self._num_steps,
            prompt_tokens_total=self._num_prompt_tokens,
            output_tokens_total=self._num_output_tokens,
            prefix_queries_total=self._num_prefix_queries,
            prefix_hits_total=self._num_prefix_hits,
            preemptions_total=self._num_preemptions,
            refused_total=self._queue.num_refused,
            overdue_total=self._num_overdue,
            poisonous_total=self._num_poisonous,
        )

    def _make_step(self, suspect: Sequence | None = None) -> StepBatch | None:
        """A step of the suspect alone, or of all who are not set aside; None if they have nothing to compute."""
        chunks: list[Chunk] = []
        new: list[NewSequence] = []
        sequences: list[Sequence] = []
        self._suspects.begin_turn(of_others=suspect is None)
        coming = self._next_to_come(suspect)
        if coming is not None and self._shares.is_light(coming):
            self._make_way(coming)
        limit = self._config.max_num_batched_tokens
        beside = self._shares.company(self._by_id.values(), coming, self._times, limit)
        for dp_rank in self.dp_ranks:
            for seq, count in dp_rank.ready(beside, is_alone=suspect is not None):
                if (new_blocks := self._grow(dp_rank, seq, count)) is not None:
                    chunks.append(self._advance(dp_rank, seq, count, new_blocks))
                    sequences.append(seq)
        while (seq := self._next_to_come(suspect)) and (room := self._find_room(seq)):
            count = self._admit(seq, room)
            new.append(seq.to_new())
            chunks.append(self._advance(room.dp_rank, seq, count, seq.block_table))
            sequences.append(seq)
        if not chunks:
            return None
        self._num_scheduled_steps += 1
        self._inflight.append(_InFlight(sequences=tuple(sequences), is_alone=suspect is not None))
        dropped, self._dropped = tuple(self._dropped), []
        return StepBatch(step_id=self._num_scheduled_steps, chunks=tuple(chunks), new=tuple(new), dropped=dropped)

    def _next_to_come(self, suspect: Sequence | None) -> Sequence | None:
        """Who is to be admitted next, if there is room."""
        if suspect is not None:
            return None if suspect.is_on_ranks else suspect
        seq = self._queue.first(self._shares.is_light) if self._suspects.has_room else None
        if seq is not None and seq.num_deaths:
            num_blamed = sum(other.num_deaths > 0 for other in self._by_id.values())
            return seq if num_blamed < MAX_BLAMED_TOGETHER else None
        return seq

    def _grow(self, dp_rank: DpRank, seq: Sequence, count: int) -> list[int] | None:
        """Add the blocks of its next `count` tokens, taking them from the last in turn there; None if that is itself.

        Only decodes ever grow, since an admission brings the blocks of all known tokens; and they are scheduled by turn
        and before prefills. So nobody is preempted who has a chunk in the step being made. The first in turn can
        preempt everybody else there, and `max_len` lets no sequence outgrow the whole pool: it always advances.
        """
        num_missing = dp_rank.num_missing(seq, count)
        while num_missing > dp_rank.pool.num_free:
            victim = dp_rank.running[-1]
            self._preempt(victim)
            if victim is seq:
                return None
        new_blocks = dp_rank.pool.allocate(num_missing)
        seq.block_table += new_blocks
        return new_blocks

    def _make_way(self, seq: Sequence) -> None:
        """For a light tenant's, where others fill a dp rank: their last in turn go, and lose no more than a turn."""
        if any(dp_rank.has_place(seq) for dp_rank in self.dp_ranks):
            return
        dp_rank = max(self.dp_ranks, key=lambda dp_rank: len(dp_rank.running))
        if dp_rank.num_missing(seq, seq.num_tokens) * (self._shares.num_parties + 1) > dp_rank.pool.num_blocks:
            return  # it is more than its tenant's share
        for victim in reversed(dp_rank.running.copy()):
            if dp_rank.has_place(seq):
                return
            if not self._shares.is_light(victim) and not victim.is_set_aside:
                self._preempt(victim)

    def _preempt(self, victim: Sequence) -> None:
        self._leave(victim)
        self._wait(victim)
        self._num_preemptions += 1

    def _find_room(self, seq: Sequence) -> Room | None:
        """Where the load is least with it, the first of several; None while it must wait."""
        rooms = [room for dp_rank in self.dp_ranks if (room := dp_rank.room(seq))]
        return min(rooms, key=lambda room: room.load, default=None)

    def _admit(self, seq: Sequence, room: Room) -> int:
        """Let it run where there is room for it; how many of its tokens now fit."""
        if not seq.is_set_aside:
            self._queue.remove(seq)
        count = room.dp_rank.admit(seq, room.hits, self._num_admissions)
        self._num_admissions += 1
        self._by_id[seq.sequence_id] = seq
        self._shares.came(seq)
        if not seq.first_scheduled:
            seq.first_scheduled = self._clock()
            seq.num_cached_tokens = min(seq.num_computed, seq.num_prompt_tokens)
            self._queue.charge(seq, PROMPT_COST * seq.num_uncomputed)
            if seq.request.is_suspect:  # its owner must know whether it has run, should this replica die
                self._deltas.append(TokenDelta(request_id=seq.request.request_id))
        self._num_prefix_queries += seq.num_tokens
        self._num_prefix_hits += seq.num_computed
        return count

    def _advance(self, dp_rank: DpRank, seq: Sequence, count: int, new_blocks: list[int]) -> Chunk:
        chunk = dp_rank.advance(seq, count, new_blocks)
        self._num_prompt_tokens += max(0, min(seq.num_computed, seq.num_prompt_tokens) - chunk.start)
        return chunk

    def _append(self, seq: Sequence, sample: Sample | None, now: float) -> None:
        if sample is None or sample.error is not None:
            self.dp_ranks[seq.dp_rank].pool.forget(seq.block_table)
            self._end(seq, "error", error="the ranks sent no token" if sample is None else sample.error)
            return
        if seq.request.pooling is not None:
            seq.first_token = now
            self._end(seq, "stop", sample)
            return
        seq.token_ids.append(sample.token_id)
        seq.first_token = seq.first_token or now
        self._num_output_tokens += 1
        self._queue.charge(seq, OUTPUT_COST)
        if seq.num_deaths and seq.num_tokens >= seq.cleared_at:
            self._suspects.clear(seq)
        if reason := seq.finish_reason:
            self._end(seq, reason, sample)
        else:
            self._deltas.append(seq.to_delta(sample))

    def _end(
        self,
        seq: Sequence,
        reason: FinishReason,
        sample: Sample | None = None,
        *,
        error: str | None = None,
        code: str | None = None,
    ) -> None:
        """The one way out. From any state, once."""
        now = self._clock()
        if seq.first_scheduled:
            self._queue.pace.end(now)
        if seq.is_on_ranks:
            self._leave(seq)
        elif not seq.is_set_aside:
            self._queue.remove(seq)
        self._suspects.clear(seq)
        self._deadlines.discard(seq)
        self._queue.forget(seq)
        del self._by_request[seq.request.request_id]
        self._deltas.append(seq.to_delta(sample, reason, error, code))
        self._on_finished(seq.to_times(reason, now))

    def _end_overdue(self) -> None:
        """What they have is theirs; nothing at all is an error."""
        while (seq := self._deadlines.first()) and (seq.request.deadline or 0.0) <= self._clock():
            self._num_overdue += 1
            if seq.num_output_tokens:
                self._end(seq, "length", code=DEADLINE_EXCEEDED)
            else:
                when = "while its prompt was computed" if seq.first_scheduled else "in the queue"
                self._end(seq, "error", error=f"The request's time was up {when}.", code=DEADLINE_EXCEEDED)

    def _blame(self, sequences: Iterable[Sequence]) -> None:
        """Ranks have died under these, which wait now or have ended since; to the latter it means nothing."""
        for seq in sequences:
            if seq.is_set_aside:
                self._num_poisonous += 1
                message = (
                    f"The request made its ranks fail {seq.num_deaths + 1} times, the last time with nothing else "
                    "running. It is not tried again."
                )
                self._end(seq, "error", error=message, code=RANKS_FAILED)
                continue
            self._suspects.blame(seq)
            if seq.is_set_aside:
                self._queue.remove(seq)

    def _wait(self, seq: Sequence) -> None:
        """Off the ranks, until its turn comes. Who is set aside has a turn of its own."""
        if not seq.is_set_aside:
            self._queue.push(seq)

    def _leave(self, seq: Sequence) -> None:
        """Take a running sequence off the ranks. Results still in flight find its id gone and are dropped."""
        del self._by_id[seq.sequence_id]
        self._shares.left(seq)
        self._dropped.append(seq.sequence_id)
        self.dp_ranks[seq.dp_rank].leave(seq)
