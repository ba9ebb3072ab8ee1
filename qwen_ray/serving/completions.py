"""/v1/completions: prompts as text or token ids, pieces to text and chunks, with echo."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from fastapi import Request

from qwen_ray.core.errors import InvalidRequest, RequestTooLarge
from qwen_ray.core.request import SamplingParams, TokenLogprobs
from qwen_ray.serving import answer_schema, schema
from qwen_ray.serving.answer import finite, prompt_logprobs, stream_response, usage
from qwen_ray.serving.call import Call
from qwen_ray.serving.generation import Generation, Generator, new_id
from qwen_ray.serving.sse import EventStream, event, unless_gone
from qwen_ray.text.choice import Choice, Piece
from qwen_ray.text.detokenizer import IncrementalDetokenizer
from qwen_ray.text.fill_in import PREFIX, FillIn
from qwen_ray.text.tokenizer import Tokenizer

MAX_SEQUENCES = 1024  # of one request


async def create(
    body: schema.CompletionRequest, request: Request, generator: Generator, call: Call
) -> answer_schema.Completion | EventStream:
    """Raises RequestError, ClientGone."""
    call.limit(body.timeout, body.priority)
    if call.keeps_contents:
        call.request = body.prompt
    sampling = await generator.with_grammar(_sampling(body), body.grammar())
    num_sequences = len(body.prompts()) * sampling.n
    if num_sequences > MAX_SEQUENCES:
        message = f"{len(body.prompts())} prompts with n={sampling.n} are {num_sequences}; at most {MAX_SEQUENCES}."
        raise RequestTooLarge(message, param="prompt", code="too_long")
    prompts = [await _encode(prompt, body, generator) for prompt in body.prompts()]
    completion = _Completion(body=body, generator=generator, id=new_id("cmpl"), created=int(call.arrival))
    generation = generator.start(
        completion.id,
        prompts,
        sampling,
        param="prompt",
        call=call,
        priority=body.priority,
        end_token_ids=_fill_in(body, generator).end_ids if body.suffix else (),
    )
    if body.stream:
        return await stream_response(request, completion.events(generation))
    return await unless_gone(request, completion.whole(generation))


async def _encode(prompt: str | list[int], body: schema.CompletionRequest, generator: Generator) -> list[int]:
    if body.suffix:
        fill_in = _fill_in(body, generator)
        before = await generator.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else prompt
        return fill_in.prompt(before, await generator.encode(body.suffix, add_special_tokens=False))
    if isinstance(prompt, str):
        return await generator.encode(prompt, add_special_tokens=body.add_special_tokens)
    return prompt


def _fill_in(body: schema.CompletionRequest, generator: Generator) -> FillIn:
    """Raises InvalidRequest where there is no way to take a suffix into account."""
    fill_in = generator.tokenizer.fill_in
    if fill_in is None:
        message = (
            f"suffix: this model fills nothing in, its vocabulary has no {PREFIX}. Leave suffix out, or ask another."
        )
        raise InvalidRequest(message, param="suffix")
    if body.echo:
        raise InvalidRequest(
            "echo does not go with suffix: the prompt is not the text before the answer.", param="echo"
        )
    return fill_in


def _sampling(body: schema.CompletionRequest) -> SamplingParams:
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens must be at least 1, or 0 with echo.", param="max_tokens")
    # Only echoing still takes a step: the prompt's log-probabilities come with a first token, which is not shown.
    sampling = body.sampling(max_tokens=1 if body.max_tokens == 0 else body.max_tokens, logprobs=body.logprobs)
    if body.echo and body.logprobs is not None:
        return replace(sampling, prompt_logprobs=max(body.logprobs, body.prompt_logprobs or 0))
    return sampling


@dataclass(slots=True)
class _Logprobs:
    """OpenAI's older form: parallel lists, and where each token starts in the text."""

    tokenizer: Tokenizer
    num_top: int
    detokenizer: IncrementalDetokenizer
    offset: int = 0
    shown: dict[str, list[Any]] = field(
        default_factory=lambda: {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    )

    def add(self, token_id: int, entry: TokenLogprobs | None) -> None:
        text = _token(self.tokenizer, token_id)
        top = None
        if entry is not None:
            top = {_token(self.tokenizer, i): finite(logprob) for i, logprob in entry.top[: self.num_top]}
            top[text] = finite(entry.logprob)
        self.shown["tokens"].append(text)
        self.shown["token_logprobs"].append(None if entry is None else finite(entry.logprob))
        self.shown["top_logprobs"].append(top)
        self.shown["text_offset"].append(self.offset)
        self.offset += len(self.detokenizer.push((token_id,)))

    def take(self) -> dict[str, list[Any]]:
        shown = self.shown
        self.shown = {name: [] for name in shown}
        return shown


def _token(tokenizer: Tokenizer, token_id: int) -> str:
    """Parts of characters as OpenAI writes them: as text, many tokens would be the same."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Completion:
    body: schema.CompletionRequest
    generator: Generator
    id: str
    created: int

    async def whole(self, generation: Generation) -> answer_schema.Completion:
        texts = [""] * len(generation.choices)
        token_ids: list[list[int]] = [[] for _ in texts]
        logprobs = self._columns(generation)
        of_prompt: list[answer_schema.PromptLogprobs | None] = [None] * len(texts)
        last: dict[int, Piece] = {}
        async with aclosing(generation.pieces()) as steps:
            async for pieces in steps:
                for piece in pieces:
                    is_first = piece.index not in last
                    texts[piece.index] += self._show(generation.choices[piece.index], piece, is_first, logprobs)
                    token_ids[piece.index] += self._token_ids(piece)
                    if is_first:
                        of_prompt[piece.index] = self._prompt_logprobs(piece)
                    last[piece.index] = piece
        wants_ids = self.body.return_token_ids
        choices = [
            answer_schema.CompletionChoice(
                index=index,
                text=texts[index],
                logprobs=answer_schema.CompletionLogprobs(**logprobs[index].take()) if logprobs else None,
                finish_reason=piece.finish_reason,
                stop_reason=piece.stop_reason,
                prompt_logprobs=of_prompt[index],
                prompt_token_ids=list(generation.choices[index].request.prompt_token_ids) if wants_ids else None,
                token_ids=token_ids[index] if wants_ids else None,
            )
            for index, piece in sorted(last.items())
        ]
        return answer_schema.Completion(
            id=self.id,
            created=self.created,
            model=self.generator.model.name,
            choices=choices,
            usage=self._usage(generation),
            system_fingerprint=self.generator.model.fingerprint,
        )

    async def events(self, generation: Generation) -> AsyncGenerator[bytes]:
        logprobs = self._columns(generation)
        opened: set[int] = set()
        async with aclosing(generation.pieces()) as steps:
            async for pieces in steps:
                data = b""
                for piece in pieces:
                    is_first = piece.index not in opened
                    opened.add(piece.index)
                    text = self._show(generation.choices[piece.index], piece, is_first, logprobs)
                    if (
                        text
                        or is_first
                        or piece.logprobs
                        or self.body.return_token_ids
                        or piece.finish_reason is not None
                    ):
                        data += self._chunk(generation.choices[piece.index], piece, text, is_first, logprobs)
                if data:
                    yield data
        if self.body.includes_usage:
            yield event({**self._head(), "choices": [], "usage": self._usage(generation).model_dump()})

    def _columns(self, generation: Generation) -> list[_Logprobs]:
        """One per choice if they are asked for, else none."""
        count = self.body.logprobs
        if count is None:
            return []
        tokenizer = self.generator.tokenizer
        skips = self.body.skip_special_tokens
        return [
            _Logprobs(tokenizer, count, IncrementalDetokenizer(tokenizer, skip_special_tokens=skips))
            for _ in generation.choices
        ]

    def _show(self, choice: Choice, piece: Piece, is_first: bool, logprobs: list[_Logprobs]) -> str:
        """The text of a piece, after the prompt where it is echoed; its log-probabilities go into `logprobs`."""
        prompt = choice.request.prompt_token_ids if self.body.echo and is_first else ()
        if logprobs:
            for token_id, entry in zip_longest(prompt, (None, *piece.prompt_logprobs) if prompt else ()):
                logprobs[piece.index].add(token_id, entry)
            for entry in () if self._is_echo_only else piece.logprobs:
                logprobs[piece.index].add(entry.token_id, entry)
        text = "" if self._is_echo_only else piece.text
        return self.generator.tokenizer.decode(prompt) + text if prompt else text

    @property
    def _is_echo_only(self) -> bool:
        return self.body.max_tokens == 0

    def _token_ids(self, piece: Piece) -> list[int]:
        return [] if self._is_echo_only else list(piece.token_ids)

    def _usage(self, generation: Generation) -> answer_schema.Usage:
        used = usage(generation)
        if self._is_echo_only:
            return used.model_copy(update={"completion_tokens": 0, "total_tokens": used.prompt_tokens})
        return used

    def _prompt_logprobs(self, piece: Piece) -> answer_schema.PromptLogprobs | None:
        if self.body.prompt_logprobs is None:
            return None
        return prompt_logprobs(piece.prompt_logprobs, self.generator.tokenizer)

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.generator.model.name,
            "system_fingerprint": self.generator.model.fingerprint,
        }

    def _chunk(self, choice: Choice, piece: Piece, text: str, is_first: bool, logprobs: list[_Logprobs]) -> bytes:
        shown: dict[str, Any] = {
            "index": piece.index,
            "text": text,
            "logprobs": logprobs[piece.index].take() if logprobs else None,
            "finish_reason": piece.finish_reason,
        }
        if piece.finish_reason is not None:
            shown["stop_reason"] = piece.stop_reason
        if is_first and self.body.prompt_logprobs is not None:
            shown["prompt_logprobs"] = self._prompt_logprobs(piece)
        if self.body.return_token_ids:
            shown["token_ids"] = self._token_ids(piece)
            shown |= {"prompt_token_ids": list(choice.request.prompt_token_ids)} if is_first else {}
        chunk = {**self._head(), "choices": [shown]}
        if self.body.includes_usage:
            chunk["usage"] = None
        return event(chunk)
