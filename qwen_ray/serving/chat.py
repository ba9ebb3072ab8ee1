"""/v1/chat/completions: a conversation to a prompt, pieces to messages and chunks; thinking apart from the answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request

from qwen_ray.core.errors import InvalidRequest
from qwen_ray.core.request import SamplingParams, Thinking, TokenLogprobs
from qwen_ray.serving import answer_schema, schema
from qwen_ray.serving.answer import prompt_logprobs, stream_response, token_logprobs, usage
from qwen_ray.serving.call import Call
from qwen_ray.serving.generation import Generation, Generator, new_id
from qwen_ray.serving.sse import EventStream, event, unless_gone
from qwen_ray.text.choice import Piece


async def create(
    body: schema.ChatRequest, request: Request, generator: Generator, call: Call
) -> answer_schema.ChatCompletion | EventStream:
    """Raises RequestError, ClientGone."""
    call.limit(body.timeout, body.priority)
    if call.keeps_contents:
        call.request = [message.model_dump(exclude_none=True) for message in body.messages]
    sampling = _sampling(body)
    prompt = await generator.encode_chat(
        [message.to_template() for message in body.messages],
        add_generation_prompt=body.add_generation_prompt,
        variables=body.template_variables,
    )
    _check_thinking(body.enable_thinking, generator.tokenizer.thinking_after(prompt))
    chat = _Chat(body=body, generator=generator, id=new_id("chatcmpl"), created=int(call.arrival))
    generation = generator.start(
        chat.id,
        [prompt],
        sampling,
        param="messages",
        call=call,
        priority=body.priority,
        splits_thinking=True,
    )
    if body.stream:
        return await stream_response(request, chat.events(generation))
    return await unless_gone(request, chat.whole(generation))


def _sampling(body: schema.ChatRequest) -> SamplingParams:
    """Names of fields in errors are those that the client wrote."""
    is_new_name = body.max_completion_tokens is not None
    try:
        sampling = body.sampling(
            max_tokens=body.max_completion_tokens if is_new_name else body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        return replace(sampling, thinking_budget=body.thinking_budget)
    except InvalidRequest as error:
        names = {"logprobs": "top_logprobs"} | ({"max_tokens": "max_completion_tokens"} if is_new_name else {})
        if error.param not in names:
            raise
        name = names[error.param]
        raise InvalidRequest(error.message.replace(error.param, name, 1), param=name, code=error.code) from error


def _check_thinking(wish: bool | None, thinking: Thinking | None) -> None:
    """Raises InvalidRequest where the model cannot do as `enable_thinking` says."""
    if wish is True and thinking is None:
        message = "enable_thinking is true, but this model does not think. Leave it out, or ask a model that does."
        raise InvalidRequest(message, param="enable_thinking")
    if wish is False and thinking is not None and thinking.starts_open:
        message = "enable_thinking is false, but this model always thinks. Leave it out, or set a thinking_budget."
        raise InvalidRequest(message, param="enable_thinking")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chat:
    body: schema.ChatRequest
    generator: Generator
    id: str
    created: int

    async def whole(self, generation: Generation) -> answer_schema.ChatCompletion:
        texts = [""] * len(generation.choices)
        reasoning = [""] * len(texts)
        logprobs: list[list[answer_schema.TokenLogprob]] = [[] for _ in texts]
        last: list[Piece | None] = [None] * len(texts)
        of_prompt: tuple[TokenLogprobs, ...] = ()
        async with aclosing(generation.pieces()) as steps:
            async for pieces in steps:
                for piece in pieces:
                    texts[piece.index] += piece.text
                    reasoning[piece.index] += self._reasoning(piece)
                    logprobs[piece.index] += self._logprobs(piece)
                    of_prompt = of_prompt or piece.prompt_logprobs
                    last[piece.index] = piece
        choices = [
            answer_schema.ChatChoice(
                index=piece.index,
                message=answer_schema.AnswerMessage(
                    content=texts[piece.index], reasoning_content=reasoning[piece.index] or None
                ),
                logprobs=answer_schema.ChatLogprobs(content=logprobs[piece.index]) if self.body.logprobs else None,
                finish_reason=piece.finish_reason or "stop",
                stop_reason=piece.stop_reason,
            )
            for piece in last
            if piece is not None
        ]
        tokenizer = self.generator.tokenizer
        return answer_schema.ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.generator.model.name,
            choices=choices,
            usage=usage(generation),
            system_fingerprint=self.generator.model.fingerprint,
            prompt_logprobs=prompt_logprobs(of_prompt, tokenizer) if self.body.prompt_logprobs is not None else None,
        )

    async def events(self, generation: Generation) -> AsyncGenerator[bytes]:
        opened: set[int] = set()
        async with aclosing(generation.pieces()) as steps:
            async for pieces in steps:
                data = b""
                for piece in pieces:
                    if piece.index not in opened:
                        opened.add(piece.index)
                        delta = {"role": "assistant", "content": "", "refusal": None}
                        data += self._chunk(piece.index, delta, first=piece)
                    data += self._gains(piece)
                    if piece.finish_reason is not None:
                        data += self._chunk(piece.index, {}, last=piece)
                if data:
                    yield data
        if self.body.includes_usage:
            yield event({**self._head(), "choices": [], "usage": usage(generation).model_dump()})

    def _gains(self, piece: Piece) -> bytes:
        """A chunk for each kind of text; the log-probabilities of all come with the first."""
        data = b""
        logprobs = self._logprobs(piece)
        for kind, text in (("reasoning_content", self._reasoning(piece)), ("content", piece.text)):
            if text or (logprobs and kind == "content"):
                data += self._chunk(piece.index, {kind: text}, logprobs=logprobs)
                logprobs = []
        return data

    def _reasoning(self, piece: Piece) -> str:
        return piece.reasoning if self.body.include_reasoning else ""

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.generator.model.name,
            "system_fingerprint": self.generator.model.fingerprint,
        }

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: list[answer_schema.TokenLogprob] | None = None,
        first: Piece | None = None,
        last: Piece | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        if logprobs:
            choice["logprobs"] = {"content": [entry.model_dump() for entry in logprobs], "refusal": None}
        if last is not None:
            choice |= {"finish_reason": last.finish_reason, "stop_reason": last.stop_reason}
        chunk = {**self._head(), "choices": [choice]}
        if first is not None and self.body.prompt_logprobs is not None:
            chunk["prompt_logprobs"] = prompt_logprobs(first.prompt_logprobs, self.generator.tokenizer)
        if self.body.includes_usage:
            chunk["usage"] = None
        return event(chunk)

    def _logprobs(self, piece: Piece) -> list[answer_schema.TokenLogprob]:
        if not self.body.logprobs:
            return []
        return token_logprobs(piece.logprobs, self.body.top_logprobs or 0, self.generator.tokenizer)
