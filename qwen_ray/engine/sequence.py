"""One request's progress in the engine: its tokens, which of them are computed, and in which blocks.

Knows when a sequence has ended, and what there is to tell of it. Knows nothing of other sequences, of who else holds a
block, or of time to come.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from qwen_ray.core.errors import ContextLengthExceeded, InvalidRequest
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.request import FinishReason, GenerateRequest, TokenDelta, TokenLogprobs
from qwen_ray.core.stats import RequestTimes
from qwen_ray.core.step import NewSequence, Sample
from qwen_ray.engine.block_pool import hash_block

NOT_ON_RANKS = -1


class Sequence:
    """Mutable; the scheduler is the one that changes it.

    `sequence_id` names one stay on the ranks, not the request: whoever comes back after a preemption gets a new one, so
    that results of steps which were still in flight then find nobody and are dropped. The token is drawn again,
    and it is the same one.
    """

    __slots__ = (
        "arrival",
        "block_hashes",
        "block_table",
        "cleared_at",
        "dp_rank",
        "first_scheduled",
        "first_token",
        "has_answered",
        "is_set_aside",
        "last_step",
        "max_len",
        "num_cached_tokens",
        "num_computed",
        "num_deaths",
        "num_known",
        "num_prompt_tokens",
        "num_registered",
        "prompt_logprobs",
        "request",
        "sequence_id",
        "stop_token_ids",
        "token_ids",
        "turn",
    )

    def __init__(self, request: GenerateRequest, *, number: int, max_len: int, now: float) -> None:
        self.request = request
        self.arrival = request.arrival or now
        self.turn = (request.priority, self.arrival, number)  # the lowest goes first, the highest is preempted first
        self.token_ids = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.max_len = max_len  # tokens, prompt and output, with which it ends
        self.stop_token_ids = frozenset(request.stop_token_ids)
        # A continued request has had its first delta, with all that is told once, from another replica.
        self.has_answered = bool(request.output_token_ids)
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.num_cached_tokens = 0  # prompt tokens that the first admission found computed
        self.block_hashes: list[bytes] = []
        self.first_scheduled = 0.0
        self.first_token = 0.0
        self.num_deaths = 0  # of ranks while it ran, without progress in between
        self.cleared_at = 0  # the number of tokens with which no death is held against it any more
        self.is_set_aside = False  # it runs alone
        self.leave_ranks()

    def leave_ranks(self) -> None:
        """Back to `prompt + tokens so far`, nothing computed."""
        self.sequence_id = NOT_ON_RANKS
        self.block_table: list[int] = []
        self.num_registered = 0  # blocks of the table whose content others can hit
        self.num_computed = 0  # tokens whose K and V are written, or will be by a step in flight
        self.num_known = 0  # tokens that the ranks have been told
        self.dp_rank = 0  # where the blocks are; means nothing off the ranks
        self.last_step = 0  # there, that it was in

    @property
    def is_on_ranks(self) -> bool:
        return self.sequence_id != NOT_ON_RANKS

    @property
    def has_begun(self) -> bool:
        """Here, or in another replica."""
        return bool(self.first_scheduled) or self.num_output_tokens > 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """1 for a decode, 0 while the next token is still being computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.sampling.prompt_logprobs is not None and not self.has_answered

    @property
    def finish_reason(self) -> FinishReason | None:
        """Whether the tokens so far end it. `max_tokens` counts all output, another replica's included."""
        if self.num_output_tokens == 0:
            return None
        sampling = self.request.sampling
        # Of a text with a grammar the ranks know when it ends: perhaps before min_tokens, when nothing more may come.
        is_long_enough = self.num_output_tokens >= sampling.min_tokens or sampling.grammar is not None
        if self.token_ids[-1] in self.stop_token_ids and is_long_enough:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_len else None

    def hashes(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Content hashes of the first `num_blocks` blocks, which must be full; computed once."""
        hashes = self.block_hashes
        for i in range(len(hashes), num_blocks):
            tokens = self.token_ids[i * block_size : (i + 1) * block_size]
            hashes.append(hash_block(hashes[-1] if hashes else b"", tokens))
        return hashes[:num_blocks]

    def add_prompt_logprobs(self, start: int, entries: Iterable[TokenLogprobs]) -> None:
        """Collect those of tokens `start, …`; what a preemption made the ranks compute twice is kept once."""
        if self.wants_prompt_logprobs:
            num_known = max(0, 1 + len(self.prompt_logprobs) - start)
            self.prompt_logprobs.extend(list(entries)[num_known:])

    def to_new(self) -> NewSequence:
        sampling = self.request.sampling
        if (
            self.has_answered and sampling.prompt_logprobs is not None
        ):  # they have been told: do not make the ranks compute them again
            sampling = replace(sampling, prompt_logprobs=None)
        return NewSequence(
            sequence_id=self.sequence_id,
            token_ids=tuple(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            sampling=sampling,
            seed=self.request.seed,
            stop_token_ids=self.request.stop_token_ids,
            dp_rank=self.dp_rank,
            pooling=self.request.pooling,
        )

    def to_delta(
        self,
        sample: Sample | None,
        reason: FinishReason | None = None,
        error: str | None = None,
        code: str | None = None,
    ) -> TokenDelta:
        """What is to be told now. What is told once, goes with the first."""
        is_first = not self.has_answered
        prompt_logprobs = tuple(self.prompt_logprobs) if is_first else ()
        self.has_answered, self.prompt_logprobs = True, []
        chosen = sample if self.request.pooling is None else None
        return TokenDelta(
            request_id=self.request.request_id,
            token_ids=() if chosen is None else (chosen.token_id,),
            logprobs=() if sample is None or sample.logprobs is None else (sample.logprobs,),
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens if is_first else 0,
            scheduled=self.first_scheduled if is_first else 0.0,
            finish_reason=reason,
            stop_token_id=chosen.token_id if chosen is not None and reason == "stop" else None,
            error=error,
            code=code,
            pooled=b"" if sample is None else sample.pooled,
        )

    def to_times(self, finish_reason: FinishReason, now: float) -> RequestTimes:
        """`first_scheduled` and `first_token` are 0 for a request that ended before."""
        return RequestTimes(
            arrival=self.arrival,
            first_scheduled=self.first_scheduled,
            first_token=self.first_token,
            finished=now,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            finish_reason=finish_reason,
        )


def longest(request: GenerateRequest, config: EngineConfig) -> int:
    """How many tokens it may become, prompt and output. Raises InvalidRequest for what can never run."""
    prompt = request.prompt_token_ids
    if not prompt:
        raise InvalidRequest("the prompt is empty.", param="prompt")
    if not 0 <= min(prompt) <= max(prompt) < 2**31:
        raise InvalidRequest("token ids must be between 0 and 2^31 - 1.", param="prompt")
    if not 0.0 < request.weight < math.inf:
        raise InvalidRequest(f"the weight must be above 0, got {request.weight}.", param="weight")
    # The last token is given out, never computed: it needs a place in the context, but none in the pool.
    in_context = f"the context of {config.max_model_len} tokens"
    for limit, what in (
        (config.max_model_len, in_context)
        if request.pooling
        else (config.max_model_len - 1, f"{in_context}, one of them for the answer"),
        (config.num_kv_tokens, f"the KV memory of {config.num_blocks} blocks of {config.block_size} tokens"),
    ):
        if len(prompt) > limit:
            raise ContextLengthExceeded(f"The prompt has {len(prompt)} tokens; at most {limit} fit {what}.")
    most = min(config.max_model_len, config.num_kv_tokens + 1)
    max_tokens = request.sampling.max_tokens
    return most if max_tokens is None else min(most, len(prompt) + max_tokens)
