"""/v1/chat/completions: a conversation to a prompt, pieces to messages and chunks.

What is thought, and calls of tools, stand apart from the answer.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import Any

from fastapi import Request

from qwen_ray.core.errors import InvalidRequest
from qwen_ray.core.request import SamplingParams, Thinking, TokenLogprobs
from qwen_ray.serving import answer_schema, schema
from qwen_ray.serving.answer import prompt_logprobs, stream_response, token_logprobs, usage
from qwen_ray.serving.call import Call
from qwen_ray.serving.generation import Generation, Generator, new_call_id, new_id
from qwen_ray.serving.sse import EventStream, event, unless_gone
from qwen_ray.serving.tools import tool_rules
from qwen_ray.text.choice import Piece
from qwen_ray.text.tool_calls import CallDelta


async def create(
    body: schema.ChatRequest, request: Request, generator: Generator, call: Call
) -> answer_schema.ChatCompletion | EventStream:
    """Raises RequestError, ClientGone."""
    call.limit(body.timeout, body.priority)
    if call.keeps_contents:
        call.request = [message.model_dump(exclude_none=True) for message in body.messages]
    rules = tool_rules(body, generator.tokenizer.tool_syntax)
    sampling = await generator.with_grammar(_sampling(body), rules.asked, after_thinking=True)
    prompt = await generator.encode_chat(body.conversation())
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
        tools=rules.use,
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


@dataclass(slots=True)
class _Answer:
    """What one choice has come to."""

    content: StringIO = field(default_factory=StringIO)
    reasoning: StringIO = field(default_factory=StringIO)
    calls: list[tuple[str, StringIO]] = field(default_factory=list[tuple[str, StringIO]])  # names, arguments
    logprobs: list[answer_schema.TokenLogprob] = field(default_factory=list[answer_schema.TokenLogprob])
    token_ids: list[int] = field(default_factory=list[int])
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, piece: Piece) -> None:
        self.content.write(piece.text)
        self.reasoning.write(piece.reasoning)
        for call in piece.calls:
            if call.name is not None:
                self.calls.append((call.name, StringIO()))
            self.calls[call.index][1].write(call.arguments)
        self.token_ids += piece.token_ids
        self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason

    def message(self, *, has_reasoning: bool) -> answer_schema.AnswerMessage:
        content = self.content.getvalue()
        calls = [
            answer_schema.ToolCall(
                id=new_call_id(), function=answer_schema.CalledFunction(name=name, arguments=arguments.getvalue())
            )
            for name, arguments in self.calls
        ]
        return answer_schema.AnswerMessage(
            content=content if content or not calls else None,
            reasoning_content=(self.reasoning.getvalue() or None) if has_reasoning else None,
            tool_calls=calls or None,
        )


def _call_deltas(call: CallDelta) -> Iterator[dict[str, Any]]:
    """As OpenAI streams them: who is called, and then with what."""
    if call.name is not None:
        function = {"name": call.name, "arguments": ""}
        yield {"index": call.index, "id": new_call_id(), "type": "function", "function": function}
    if call.arguments:
        yield {"index": call.index, "function": {"arguments": call.arguments}}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chat:
    body: schema.ChatRequest
    generator: Generator
    id: str
    created: int

    async def whole(self, generation: Generation) -> answer_schema.ChatCompletion:
        answers = [_Answer() for _ in generation.choices]
        of_prompt: tuple[TokenLogprobs, ...] = ()
        async with aclosing(generation.pieces()) as steps:
            async for pieces in steps:
                for piece in pieces:
                    answers[piece.index].add(piece)
                    answers[piece.index].logprobs += self._logprobs(piece)
                    of_prompt = of_prompt or piece.prompt_logprobs
        tokenizer = self.generator.tokenizer
        return answer_schema.ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.generator.model.name,
            choices=[self._choice(index, answer) for index, answer in enumerate(answers)],
            usage=usage(generation),
            system_fingerprint=self.generator.model.fingerprint,
            prompt_logprobs=prompt_logprobs(of_prompt, tokenizer) if self.body.prompt_logprobs is not None else None,
            prompt_token_ids=self._prompt_ids(generation),
        )

    def _choice(self, index: int, answer: _Answer) -> answer_schema.ChatChoice:
        return answer_schema.ChatChoice(
            index=index,
            message=answer.message(has_reasoning=self.body.include_reasoning),
            logprobs=answer_schema.ChatLogprobs(content=answer.logprobs) if self.body.logprobs else None,
            finish_reason=answer.finish_reason or "stop",
            stop_reason=answer.stop_reason,
            token_ids=answer.token_ids if self.body.return_token_ids else None,
        )

    def _prompt_ids(self, generation: Generation) -> list[int] | None:
        return list(generation.choices[0].request.prompt_token_ids) if self.body.return_token_ids else None

    async def events(self, generation: Generation) -> AsyncGenerator[bytes]:
        opened: set[int] = set()
        async with aclosing(generation.pieces()) as steps:
            async for pieces in steps:
                data = b""
                for piece in pieces:
                    if piece.index not in opened:
                        opened.add(piece.index)
                        delta = {"role": "assistant", "content": "", "refusal": None}
                        data += self._chunk(piece.index, delta, first=piece, prompt_ids=self._prompt_ids(generation))
                    data += self._gains(piece)
                    if piece.finish_reason is not None:
                        data += self._chunk(piece.index, {}, last=piece)
                if data:
                    yield data
        if self.body.includes_usage:
            yield event({**self._head(), "choices": [], "usage": usage(generation).model_dump()})

    def _gains(self, piece: Piece) -> bytes:
        """A chunk for each kind of text and each call; log-probabilities and token ids of all come with the first."""
        deltas: list[dict[str, Any]] = []
        for kind, text in (("reasoning_content", self._reasoning(piece)), ("content", piece.text)):
            if text:
                deltas.append({kind: text})
        deltas += [{"tool_calls": [gained]} for call in piece.calls for gained in _call_deltas(call)]
        logprobs = self._logprobs(piece)
        token_ids = list(piece.token_ids) if self.body.return_token_ids else []
        if not deltas and (logprobs or token_ids):
            deltas.append({"content": ""})
        data = b""
        for delta in deltas:
            data += self._chunk(piece.index, delta, logprobs=logprobs, token_ids=token_ids)
            logprobs, token_ids = [], []
        return data

    def _reasoning(self, piece: Piece) -> str:
        return piece.reasoning if self.body.include_reasoning else ""

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.generator.model.name,
            "service_tier": "default",
            "system_fingerprint": self.generator.model.fingerprint,
        }

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: list[answer_schema.TokenLogprob] | None = None,
        token_ids: list[int] | None = None,
        prompt_ids: list[int] | None = None,
        first: Piece | None = None,
        last: Piece | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        if logprobs:
            choice["logprobs"] = {"content": [entry.model_dump() for entry in logprobs], "refusal": None}
        if last is not None:
            choice |= {"finish_reason": last.finish_reason, "stop_reason": last.stop_reason}
        if token_ids:
            choice["token_ids"] = token_ids
        chunk = {**self._head(), "choices": [choice]}
        if prompt_ids is not None:
            chunk["prompt_token_ids"] = prompt_ids
        if first is not None and self.body.prompt_logprobs is not None:
            chunk["prompt_logprobs"] = prompt_logprobs(first.prompt_logprobs, self.generator.tokenizer)
        if self.body.includes_usage:
            chunk["usage"] = None
        return event(chunk)

    def _logprobs(self, piece: Piece) -> list[answer_schema.TokenLogprob]:
        if not self.body.logprobs:
            return []
        return token_logprobs(piece.logprobs, self.body.top_logprobs or 0, self.generator.tokenizer)
