"""From prompts to numbers: what embeddings and scores have in common.

Each prompt is a request of its own, on whichever replica is free, and is handed over like any other. Knows nothing of
JSON, nor of what the numbers mean.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qwen_ray.core.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    Overloaded,
    RequestError,
    RequestFailed,
    RequestTooLarge,
)
from qwen_ray.core.pooling import Pooling, to_floats
from qwen_ray.core.request import FinishReason, GenerateRequest, SamplingParams
from qwen_ray.core.stats import RequestTimes
from qwen_ray.metrics.recorder import IngressRecorder
from qwen_ray.serving.call import Call
from qwen_ray.serving.dispatch import Dispatcher
from qwen_ray.serving.generation import Generator, off_loop

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_AT_ONCE = 32  # prompts of one request that are under way: the queue is there for others too
MAX_TOKENS = 2**20  # of all prompts of one request
MAX_CHARACTERS = 2**23
NO_SAMPLING = SamplingParams(max_tokens=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One HTTP request's prompts. `param` is the field that they came in."""

    id: str
    param: str
    prompts: Sequence[Sequence[int]]
    priority: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.prompts))


class Pooler:
    def __init__(self, generator: Generator, dispatcher: Dispatcher, recorder: IngressRecorder) -> None:
        self.generator = generator
        self._dispatcher = dispatcher
        self._recorder = recorder

    async def encode(
        self, param: str, items: Sequence[T], encode: Callable[[T], list[int]], num_characters: int
    ) -> list[list[int]]:
        """Token ids of each of `items`, which have `num_characters` together. Raises what `encode` does, and
        RequestTooLarge.
        """
        if num_characters > MAX_CHARACTERS:
            message = f"{param}: at most {MAX_CHARACTERS} characters in one request, got {num_characters}."
            raise RequestTooLarge(message, param=param, code="too_long")
        # A short text takes as long as some characters more.
        return await off_loop(lambda: [encode(item) for item in items], num_characters + 256 * len(items))

    async def pool(self, asked: Asked, pooling: Pooling, call: Call) -> list[array[float]]:
        """The numbers of each prompt. Raises RequestError, and then nothing of it runs any more."""
        self._check(asked)
        call.asks(asked.num_tokens)
        pooled: list[array[float]] = [array("f")] * len(asked.prompts)
        numbers = deque(range(len(asked.prompts)))
        num_at_once = min(MAX_AT_ONCE, len(numbers))

        async def work() -> None:
            nonlocal num_at_once
            while numbers:
                number = numbers.popleft()
                try:
                    pooled[number] = to_floats(await self._answer(self._request(asked, number, pooling, call), call))
                except Overloaded:
                    numbers.appendleft(number)  # for one of those that have a place
                    if num_at_once == 1:
                        raise
                    break
            num_at_once -= 1

        self._recorder.dispatched(time.time() - call.arrival)
        call.trail.was_dispatched()
        call.answer_id = asked.id
        reason: FinishReason = "abort"
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(num_at_once):
                    group.create_task(work())
        except ExceptionGroup as errors:
            reason = "error"
            raise next((e for e in errors.exceptions if isinstance(e, RequestError)), errors) from None
        finally:
            for number in numbers:  # refused, or not even begun
                self._record(len(asked.prompts[number]), reason, call.arrival, time.time())
        now = time.time()
        call.trail.had_tokens(now, now)
        call.outcome = "stop"
        return pooled

    def _check(self, asked: Asked) -> None:
        limit, vocab_size = self.generator.model.max_model_len, self.generator.model.vocab_size
        if asked.num_tokens > MAX_TOKENS:
            message = f"{asked.param}: at most {MAX_TOKENS} tokens in one request, got {asked.num_tokens}."
            raise RequestTooLarge(message, param=asked.param, code="too_long")
        for number, prompt in enumerate(asked.prompts):
            if not prompt:
                raise InvalidRequest(f"{asked.param}: number {number} has no tokens.", param=asked.param)
            if len(prompt) > limit:
                raise ContextLengthExceeded(
                    f"This model's maximum context length is {limit} tokens; {asked.param} number {number} has "
                    f"{len(prompt)}. Ask with truncate_prompt_tokens: -1 to have it cut.",
                    param=asked.param,
                )
            if not 0 <= min(prompt) <= max(prompt) < vocab_size:
                self.generator.check_ids(asked.param, prompt)

    def _request(self, asked: Asked, number: int, pooling: Pooling, call: Call) -> GenerateRequest:
        request = GenerateRequest(
            request_id=f"{asked.id}-{number}",
            prompt_token_ids=tuple(asked.prompts[number]),
            sampling=NO_SAMPLING,
            seed=0,
            priority=asked.priority,
            tenant=call.caller.id,
            weight=call.caller.weight,
            deadline=call.deadline,
            arrival=time.time(),
            pooling=pooling,
        )
        if self.generator.logs_requests:
            prompt = self.generator.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
            logger.info("%s asks %r with %s", request.request_id, prompt, pooling)
        return request

    async def _answer(self, request: GenerateRequest, call: Call) -> bytes:
        submitted = time.time()
        reason: FinishReason | None = "abort"
        try:
            with self._dispatcher.open([request], call.trail) as stream:
                async with asyncio.timeout(call.patience):
                    ((_, delta),) = await stream.take()
            if delta.finish_reason != "stop":
                raise RequestFailed(f"A prompt was not computed to its end: {delta.finish_reason}.")
            reason = "stop"
            return delta.pooled
        except TimeoutError:
            reason = "error"
            raise call.too_late() from None
        except RequestError as error:
            reason = None if isinstance(error, Overloaded) else "error"  # it has not begun, and may be tried again
            raise
        finally:
            if reason is not None:
                self._record(len(request.prompt_token_ids), reason, call.arrival, submitted)

    def _record(self, num_tokens: int, reason: FinishReason, arrival: float, submitted: float) -> None:
        now = time.time()
        if reason == "stop":
            self._recorder.prompt_tokens(num_tokens)
        self._recorder.finished(
            RequestTimes(
                arrival=arrival,
                first_scheduled=submitted,
                first_token=now,
                finished=now,
                num_prompt_tokens=num_tokens,
                num_output_tokens=0,
                finish_reason=reason,
            )
        )
