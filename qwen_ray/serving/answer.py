"""What the answers of chat and completions share: usage, log-probabilities, and errors that can still be a status."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

from fastapi import Request

from qwen_ray.core.errors import RequestError
from qwen_ray.core.request import TokenLogprobs
from qwen_ray.serving.answer_schema import (
    CompletionTokensDetails,
    PromptLogprobs,
    PromptTokensDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from qwen_ray.serving.errors import error_body
from qwen_ray.serving.generation import Generation
from qwen_ray.serving.sse import DONE, EventStream, event, unless_gone
from qwen_ray.text.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # OpenAI's for what is all but impossible; JSON has no infinity


def usage(generation: Generation) -> Usage:
    prompt, completion = generation.num_prompt_tokens, generation.num_tokens
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=generation.num_cached_tokens, audio_tokens=0),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=generation.num_reasoning_tokens),
    )


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB


def token_logprobs(entries: Iterable[TokenLogprobs], num_top: int, tokenizer: Tokenizer) -> list[TokenLogprob]:
    """As chat completions show them, with `num_top` alternatives."""

    def shown(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}

    return [
        TokenLogprob(
            **shown(entry.token_id, entry.logprob),
            top_logprobs=[TopLogprob(**shown(*top)) for top in entry.top[:num_top]],
        )
        for entry in entries
    ]


def prompt_logprobs(entries: Iterable[TokenLogprobs], tokenizer: Tokenizer) -> PromptLogprobs:
    """As vLLM shows them: nothing for the first token; then the token itself and its alternatives, by id."""
    shown: PromptLogprobs = [None]
    for entry in entries:
        pairs = {entry.token_id: entry.logprob, **dict(entry.top)}
        shown.append(
            {
                str(token_id): {"logprob": finite(logprob), "decoded_token": token_text(tokenizer, token_id)}
                for token_id, logprob in pairs.items()
            }
        )
    return shown


async def stream_response(request: Request, events: AsyncGenerator[bytes]) -> EventStream:
    """Waits for the first event, so that what fails before it is still an HTTP status. Later errors are events."""
    first = await unless_gone(request, anext(events))

    async def rest() -> AsyncGenerator[bytes]:
        async with aclosing(events):
            yield first
            try:
                async for data in events:
                    yield data
            except RequestError as error:
                yield event(error_body(error))
            yield DONE

    return EventStream(rest())
