"""From a prompt to pieces of text: what chat and completions have in common.

`Model` is what is served. `Generator` makes requests out of prompts and starts them; a `Generation` is one HTTP
request's choices while they grow. Knows nothing of JSON, routes or replicas.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from qwen_ray.core.errors import ContextLengthExceeded, InvalidRequest, RequestError
from qwen_ray.core.pooling import EmbeddingConfig, Task
from qwen_ray.core.request import GenerateRequest, Grammar, SamplingParams, TokenDelta
from qwen_ray.core.stats import RequestTimes
from qwen_ray.grammar.checker import GrammarChecker
from qwen_ray.metrics.recorder import IngressRecorder
from qwen_ray.serving.call import Call
from qwen_ray.serving.dispatch import Dispatcher
from qwen_ray.serving.journal import Stream
from qwen_ray.text.chat import Conversation
from qwen_ray.text.choice import Choice, Piece
from qwen_ray.text.tokenizer import Tokenizer
from qwen_ray.text.tool_calls import ToolUse

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Text longer than this is tokenized in a thread: beside the loop it delays nobody's stream.
MAX_CHARACTERS_ON_LOOP = 4096
# What a request says in fields of its own, and so not through chat_template_kwargs.
NOT_VARIABLES = {"messages", "tools", "add_generation_prompt", "continue_final_message"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What clients are told about the model that is served."""

    name: str
    source: str
    created: int  # seconds since the epoch
    fingerprint: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    task: Task = "generate"
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    hidden_size: int = 0  # numbers of a vector


class Generation:
    """One HTTP request's choices, `n` for each prompt: choice `index` belongs to prompt `index // n`."""

    def __init__(
        self,
        choices: list[Choice],
        n: int,
        call: Call,
        dispatcher: Dispatcher,
        recorder: IngressRecorder,
        on_text: Callable[[Choice, Piece], None],
    ) -> None:
        self.choices = choices
        self._firsts = choices[::n]  # of each prompt
        self._call = call
        self._by_id = {choice.request.request_id: choice for choice in choices}
        self._dispatcher = dispatcher
        self._recorder = recorder
        self._on_text = on_text

    @property
    def num_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def num_reasoning_tokens(self) -> int:
        return sum(choice.num_reasoning_tokens for choice in self.choices)

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt counted once."""
        return sum(len(choice.request.prompt_token_ids) for choice in self._firsts)

    @property
    def num_cached_tokens(self) -> int:
        """Of the first choice of each prompt: the others hit what it has computed."""
        return sum(choice.num_cached_tokens for choice in self._firsts)

    async def pieces(self) -> AsyncGenerator[list[Piece]]:
        """Until every choice has finished; what is left is aborted when the iterator is closed.

        Raises RequestError. Before the first item nothing has been shown, so it can still be an HTTP status.
        """
        clock = _Clock(self._recorder, self._call, self.choices)
        try:
            with self._dispatcher.open([choice.request for choice in self.choices], self._call.trail) as stream:
                clock.dispatched()
                while stream.is_open:
                    pieces: list[Piece] = []
                    for request_id, delta in await self._take(stream):
                        choice = self._by_id[request_id]
                        if choice.finish_reason is not None:  # by a stop string, a moment ago
                            continue
                        pieces.append(choice.push(delta))
                        clock.took(choice, len(pieces[-1].token_ids))
                        self._call.gets(choice.index, len(pieces[-1].token_ids), pieces[-1].said)
                        self._on_text(choice, pieces[-1])
                        if choice.finish_reason is not None:
                            stream.drop(request_id)
                    if pieces:
                        yield pieces
        except RequestError as error:
            clock.ended("error")
            self._call.outcome = error.code or error.kind
            raise
        finally:
            clock.ended("abort")
            self._call.trail.num_cached_tokens = self.num_cached_tokens
            ends = {choice.finish_reason or "abort" for choice in self.choices}
            self._call.outcome = self._call.outcome or " ".join(sorted(ends))

    async def _take(self, stream: Stream) -> list[tuple[str, TokenDelta]]:
        """Raises DeadlineExceeded where no replica has ended the request by its deadline: none may be there."""
        try:
            async with asyncio.timeout(self._call.patience):
                return await stream.take()
        except TimeoutError:
            raise self._call.too_late() from None


class _Clock:
    """When each choice was where, told to the recorder; every choice ends once."""

    def __init__(self, recorder: IngressRecorder, call: Call, choices: Iterable[Choice]) -> None:
        self._recorder = recorder
        self._arrival = call.arrival
        self._trail = call.trail
        self._submitted = 0.0
        self._first: dict[Choice, float] = {}
        self._last: dict[Choice, float] = {}
        self._open = dict.fromkeys(choices)  # a set that keeps its order

    def dispatched(self) -> None:
        self._submitted = time.time()
        self._trail.was_dispatched()
        self._recorder.dispatched(self._submitted - self._arrival)

    def took(self, choice: Choice, num_tokens: int) -> None:
        now = time.time()
        if num_tokens and choice not in self._first:
            self._first[choice] = now
            num_prompt_tokens = len(choice.request.prompt_token_ids)
            self._recorder.first_tokens(now - self._arrival, num_prompt_tokens, num_tokens)
        elif num_tokens:
            self._recorder.next_tokens(now - self._last[choice], num_tokens)
        self._last[choice] = now
        if choice.finish_reason is not None:
            self._finish(choice, choice.finish_reason, now)

    def ended(self, reason: str) -> None:
        """Of all that have not finished."""
        for choice in list(self._open):
            self._finish(choice, reason, time.time())
        if self._first:
            self._trail.had_tokens(min(self._first.values()), max(self._last.values()))

    def _finish(self, choice: Choice, reason: str, now: float) -> None:
        if choice not in self._open:
            return
        del self._open[choice]
        self._recorder.finished(
            RequestTimes(
                arrival=self._arrival,
                first_scheduled=self._submitted or now,
                first_token=self._first.get(choice, now),
                finished=now,
                num_prompt_tokens=len(choice.request.prompt_token_ids),
                num_output_tokens=choice.num_tokens,
                finish_reason=reason,
            )
        )


class Generator:
    """`log_requests` writes prompts and answers to the log: for finding out, not for production."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        dispatcher: Dispatcher,
        recorder: IngressRecorder,
        grammars: GrammarChecker,
        *,
        log_requests: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._dispatcher = dispatcher
        self._recorder = recorder
        self._grammars = grammars
        self._log_requests = log_requests

    @property
    def logs_requests(self) -> bool:
        return self._log_requests

    async def encode_chat(self, conversation: Conversation) -> list[int]:
        """Raises InvalidRequest when the chat template refuses the messages."""
        variables = conversation.variables
        if taken := NOT_VARIABLES & variables.keys():
            raise InvalidRequest(f"chat_template_kwargs must not hold {min(taken)}.", param="chat_template_kwargs")

        def encode() -> list[int]:
            text = self.tokenizer.render_chat(
                conversation.messages,
                conversation.tools or None,
                add_generation_prompt=conversation.begins_answer,
                continue_final_message=conversation.continues,
                **variables,
            )
            return self.tokenizer.encode(text, add_special_tokens=False)

        return await off_loop(encode, conversation.num_characters)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return await off_loop(lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens), len(text))

    async def decode(self, token_ids: Sequence[int]) -> str:
        return await off_loop(lambda: self.tokenizer.decode(token_ids, skip_special_tokens=False), len(token_ids))

    async def with_grammar(
        self, sampling: SamplingParams, asked: tuple[str, Grammar] | None, *, after_thinking: bool = False
    ) -> SamplingParams:
        """`asked`: the field that came with a grammar, and the grammar. Raises InvalidRequest, Overloaded, NotReady."""
        if asked is None:
            return sampling
        param, grammar = asked
        if not self.model.eos_token_ids:
            message = f"{param}: this model has no token to end a text with, so that it cannot follow a grammar."
            raise InvalidRequest(message, param=param)
        try:
            grammar = await self._grammars.check(grammar)
        except InvalidRequest as error:
            raise InvalidRequest(f"{param}: {error.message}", param=param, code="invalid_grammar") from error
        return replace(sampling, grammar=replace(grammar, after_thinking=after_thinking))

    def start(
        self,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        param: str,
        call: Call,
        priority: int = 0,
        splits_thinking: bool = False,
        tools: ToolUse | None = None,
        end_token_ids: Sequence[int] = (),
    ) -> Generation:
        """`param` is the field that prompts came in; `end_token_ids` end an answer as the model's own do.

        Raises InvalidRequest, ContextLengthExceeded, RateLimited.
        """
        self.check_ids("logit_bias", sampling.logit_bias)
        self.check_ids("stop_token_ids", sampling.stop_token_ids)
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
        # With a grammar, ignore_eos is the ranks' business: they know when nothing else is left.
        keeps_ends = not sampling.ignore_eos or sampling.grammar is not None
        ends = (*self.model.eos_token_ids, *end_token_ids) if keeps_ends else ()
        choices: list[Choice] = []
        for number, prompt in enumerate(prompts):
            self.check_ids(param, prompt)
            alone = replace(sampling, max_tokens=self._room(prompt, sampling.max_tokens, param), stop=(), seed=None)
            request = GenerateRequest(
                request_id=f"{request_id}-{number}",
                prompt_token_ids=tuple(prompt),
                sampling=self.tokenizer.with_thinking(alone, prompt),
                seed=seed,
                stop_token_ids=tuple(dict.fromkeys((*sampling.stop_token_ids, *ends))),
                priority=priority,
                tenant=call.caller.id,
                weight=call.caller.weight,
                deadline=call.deadline,
                arrival=time.time(),  # at the replicas: what was spent on text before is not time in their queue
            )
            choices += [
                Choice(
                    len(choices) + i,
                    single,
                    sampling.stop,
                    self.tokenizer,
                    splits_thinking=splits_thinking,
                    tools=tools,
                )
                for i, single in enumerate(request.choices())
            ]
        call.asks(sum(map(len, prompts)))
        call.answer_id = request_id
        return Generation(choices, sampling.n, call, self._dispatcher, self._recorder, self._log)

    def _log(self, choice: Choice, piece: Piece) -> None:
        if not self._log_requests:
            return
        request = choice.request
        if choice.num_tokens == len(piece.token_ids):
            prompt = self.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
            logger.info("%s asks %r with %s", request.request_id, prompt, request.sampling)
        logger.info("%s gets %r %s", request.request_id, piece.said, piece.finish_reason or "")

    def _room(self, prompt: Sequence[int], max_tokens: int | None, param: str) -> int:
        """How many tokens may follow `prompt`."""
        limit = self.model.max_model_len
        if not prompt:
            raise InvalidRequest(f"{param} must hold at least one token.", param=param)
        if len(prompt) >= limit:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {limit} tokens; {param} has {len(prompt)} tokens.", param=param
            )
        if max_tokens is not None and len(prompt) + max_tokens > limit:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {limit} tokens; {param} has {len(prompt)} and "
                f"max_tokens asks for {max_tokens} more.",
                param=param,
            )
        return limit - len(prompt) if max_tokens is None else max_tokens

    def check_ids(self, param: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self.model.vocab_size:
                raise InvalidRequest(
                    f"{param}: {token_id} is no token id; the vocabulary has {self.model.vocab_size}.", param=param
                )


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


async def off_loop(work: Callable[[], T], num_characters: int) -> T:
    return work() if num_characters <= MAX_CHARACTERS_ON_LOOP else await asyncio.to_thread(work)
