"""Which tokens of which sequences are computed in the next step, and what a step's result means for each.

There are no phases: a sequence gets `min(budget, num_tokens - num_computed)` tokens. One is a decode, many are a chunk
of a prefill, a prefix hit is a head start. One queue feeds all dp ranks; what goes on in each, `dp_rank.py` knows.
Knows nothing of tasks, transport or processes; `engine.py` turns the handle.

Ranks run steps in the order in which they were scheduled, and within a layer write all K and V of a step before any
of its tokens attends. From that alone follows
  * that a block can be hit from the moment its computation is *scheduled*, even within the same step;
  * that blocks can be freed at any moment: a step in flight that still writes to them runs before any step that could
    give them to somebody else.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Callable

from qwen_ray.core.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.request import FinishReason, GenerateRequest, TokenDelta
from qwen_ray.core.stats import EngineStats, RequestTimes
from qwen_ray.core.step import Chunk, NewSequence, Sample, StepBatch, StepResult
from qwen_ray.engine.dp_rank import DpRank, Room, by_turn
from qwen_ray.engine.sequence import Sequence

MAX_RETRY_AFTER = 60.0  # seconds


class Scheduler:
    """`on_finished` is told the times of every request that has ended."""

    def __init__(self, config: EngineConfig, on_finished: Callable[[RequestTimes], None]) -> None:
        self.dp_ranks = tuple(DpRank(number, config) for number in range(config.dp_attention))
        self.waiting: list[Sequence] = []  # by turn
        self._config = config
        self._on_finished = on_finished
        self._by_request: dict[str, Sequence] = {}
        self._by_id: dict[int, Sequence] = {}  # running
        self._dropped: list[int] = []  # to be told to the ranks with the next step
        self._deltas: list[TokenDelta] = []
        self._finish_times: deque[float] = deque(maxlen=64)
        self._num_requests = 0
        self._num_admissions = 0
        self._num_scheduled_steps = 0
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0
        self._num_preemptions = 0

    @property
    def is_idle(self) -> bool:
        return not self._by_request

    def add(self, request: GenerateRequest) -> None:
        """Queue it. Raises InvalidRequest, ContextLengthExceeded or Overloaded; then nothing has changed."""
        max_len = self._checked_max_len(request)
        if request.request_id in self._by_request:
            raise InvalidRequest(f"request {request.request_id} is running already.", param="request_id")
        if len(self.waiting) >= self._config.max_num_waiting:
            raise Overloaded(
                f"{len(self.waiting)} requests are waiting, which is the limit.", retry_after=self._retry_after()
            )
        seq = Sequence(request, number=self._num_requests, max_len=max_len, now=time.time())
        self._num_requests += 1
        self._by_request[request.request_id] = seq
        insort(self.waiting, seq, key=by_turn)
        if reason := seq.finish_reason:  # continued, but its owner missed that it had ended
            self._end(seq, reason)

    def abort(self, request_id: str) -> None:
        """End it, whatever it is doing; one that has ended before is none of our business."""
        if seq := self._by_request.get(request_id):
            self._end(seq, "abort")

    def schedule(self) -> StepBatch | None:
        """The next step, or None while there is nothing to compute."""
        chunks: list[Chunk] = []
        new: list[NewSequence] = []
        for dp_rank in self.dp_ranks:
            for seq, count in dp_rank.ready():
                if (new_blocks := self._grow(dp_rank, seq, count)) is not None:
                    chunks.append(self._advance(dp_rank, seq, count, new_blocks))
        while self.waiting and (room := self._find_room(self.waiting[0])):
            seq, count = self._admit(room)
            new.append(seq.to_new())
            chunks.append(self._advance(room.dp_rank, seq, count, seq.block_table))
        if not chunks:
            return None
        self._num_scheduled_steps += 1
        dropped, self._dropped = tuple(self._dropped), []
        return StepBatch(step_id=self._num_scheduled_steps, chunks=tuple(chunks), new=tuple(new), dropped=dropped)

    def update(self, batch: StepBatch, result: StepResult) -> list[TokenDelta]:
        """Take in a step's result; returns what there is to tell, ends since the last call included."""
        self._num_steps += 1
        now = time.time()
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

    def reset(self) -> None:
        """The ranks have lost all K and V: everything running waits again, as `prompt + tokens so far`."""
        for dp_rank in self.dp_ranks:
            for seq in dp_rank.clear():
                insort(self.waiting, seq, key=by_turn)
        self._by_id.clear()
        self._dropped.clear()

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._by_id),
            num_waiting=len(self.waiting),
            num_waiting_tokens=sum(seq.num_tokens for seq in self.waiting),
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
        )

    def _grow(self, dp_rank: DpRank, seq: Sequence, count: int) -> list[int] | None:
        """Add the blocks of its next `count` tokens, taking them from the last in turn there; None if that is itself.

        Only decodes ever grow, since an admission brings the blocks of all known tokens; and they are scheduled by turn
        and before prefills. So nobody is preempted who has a chunk in the step being made. The first in turn can
        preempt everybody else there, and `max_len` lets no sequence outgrow the whole pool: it always advances.
        """
        num_missing = dp_rank.num_missing(seq, count)
        while num_missing > dp_rank.pool.num_free:
            victim = dp_rank.running[-1]
            self._leave(victim)
            insort(self.waiting, victim, key=by_turn)
            self._num_preemptions += 1
            if victim is seq:
                return None
        new_blocks = dp_rank.pool.allocate(num_missing)
        seq.block_table += new_blocks
        return new_blocks

    def _find_room(self, seq: Sequence) -> Room | None:
        """Where the load is least with it, the first of several; None while it must wait."""
        rooms = [room for dp_rank in self.dp_ranks if (room := dp_rank.room(seq))]
        return min(rooms, key=lambda room: room.load, default=None)

    def _admit(self, room: Room) -> tuple[Sequence, int]:
        """The first in the queue, to where there is room for it; and how many of its tokens now fit."""
        seq = self.waiting.pop(0)
        count = room.dp_rank.admit(seq, room.hits, self._num_admissions)
        self._num_admissions += 1
        self._by_id[seq.sequence_id] = seq
        if not seq.first_scheduled:
            seq.first_scheduled = time.time()
            seq.num_cached_tokens = min(seq.num_computed, seq.num_prompt_tokens)
        self._num_prefix_queries += seq.num_tokens
        self._num_prefix_hits += seq.num_computed
        return seq, count

    def _advance(self, dp_rank: DpRank, seq: Sequence, count: int, new_blocks: list[int]) -> Chunk:
        chunk = dp_rank.advance(seq, count, new_blocks)
        self._num_prompt_tokens += max(0, min(seq.num_computed, seq.num_prompt_tokens) - chunk.start)
        return chunk

    def _append(self, seq: Sequence, sample: Sample | None, now: float) -> None:
        if sample is None or sample.error is not None:
            self.dp_ranks[seq.dp_rank].pool.forget(seq.block_table)
            self._end(seq, "error", error="the ranks sent no token" if sample is None else sample.error)
            return
        seq.token_ids.append(sample.token_id)
        seq.first_token = seq.first_token or now
        self._num_output_tokens += 1
        if reason := seq.finish_reason:
            self._end(seq, reason, sample)
        else:
            self._tell(seq, sample)

    def _end(
        self, seq: Sequence, reason: FinishReason, sample: Sample | None = None, *, error: str | None = None
    ) -> None:
        """The one way out. From any state, once."""
        if seq.is_on_ranks:
            self._leave(seq)
        else:
            self.waiting.remove(seq)
        del self._by_request[seq.request.request_id]
        self._tell(seq, sample, reason, error)
        now = time.time()
        self._finish_times.append(now)
        self._on_finished(seq.to_times(reason, now))

    def _leave(self, seq: Sequence) -> None:
        """Take a running sequence off the ranks. Results still in flight find its id gone and are dropped."""
        del self._by_id[seq.sequence_id]
        self._dropped.append(seq.sequence_id)
        self.dp_ranks[seq.dp_rank].leave(seq)

    def _tell(
        self,
        seq: Sequence,
        sample: Sample | None,
        reason: FinishReason | None = None,
        error: str | None = None,
    ) -> None:
        first = not seq.has_answered
        self._deltas.append(
            TokenDelta(
                request_id=seq.request.request_id,
                token_ids=() if sample is None else (sample.token_id,),
                logprobs=() if sample is None or sample.logprobs is None else (sample.logprobs,),
                prompt_logprobs=tuple(seq.prompt_logprobs) if first else (),
                num_cached_tokens=seq.num_cached_tokens if first else 0,
                finish_reason=reason,
                stop_token_id=sample.token_id if sample is not None and reason == "stop" else None,
                error=error,
            )
        )
        if first:
            seq.has_answered = True
            seq.prompt_logprobs = []

    def _checked_max_len(self, request: GenerateRequest) -> int:
        """How long it may become, prompt and output. Raises for what can never run."""
        config, prompt = self._config, request.prompt_token_ids
        if not prompt:
            raise InvalidRequest("the prompt is empty.", param="prompt")
        if not 0 <= min(prompt) <= max(prompt) < 2**31:
            raise InvalidRequest("token ids must be between 0 and 2^31 - 1.", param="prompt")
        # The last token is given out, never computed: it needs a place in the context, but none in the pool.
        for limit, what in (
            (config.max_model_len - 1, f"the context of {config.max_model_len} tokens, one of them for the answer"),
            (config.num_kv_tokens, f"the KV memory of {config.num_blocks} blocks of {config.block_size} tokens"),
        ):
            if len(prompt) > limit:
                raise ContextLengthExceeded(f"The prompt has {len(prompt)} tokens; at most {limit} fit {what}.")
        max_tokens = request.sampling.max_tokens
        longest = min(config.max_model_len, config.num_kv_tokens + 1)
        return longest if max_tokens is None else min(longest, len(prompt) + max_tokens)

    def _retry_after(self) -> float:
        """Seconds until today's queue has been served, at the rate at which requests ended lately."""
        times = self._finish_times
        if len(times) < 2:
            return 1.0
        seconds_each = (time.time() - times[0]) / len(times)
        return min(MAX_RETRY_AFTER, max(1.0, seconds_each * len(self.waiting)))
