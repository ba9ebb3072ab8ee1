"""The offline door: the same engine as the server's, in this process, without Ray.

    llm = LLM("demo", dtype="float32")
    for output in llm.generate(["The capital of France is"], SamplingParams(max_tokens=16)):
        print(output.outputs[0].text)

Knows how settings, planner, tokenizer, engine and one rank fit together; what each of them does is its own business.
"""

from __future__ import annotations

import asyncio
import queue
import secrets
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from qwen_ray.config import OPTIONS, Settings, load_settings
from qwen_ray.core.errors import InvalidRequest, QwenRayError, RequestFailed, SettingsError
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.pooling import Pooling, Task, shaped, sigmoid, to_floats
from qwen_ray.core.request import GenerateRequest, Grammar, SamplingParams, TokenDelta, TokenLogprobs
from qwen_ray.core.stats import EngineStats, RankStats
from qwen_ray.engine.engine import Engine
from qwen_ray.engine.executor import Executor
from qwen_ray.grammar.check_process import tried
from qwen_ray.grammar.matcher import GrammarCompiler
from qwen_ray.machine import this_machine
from qwen_ray.planner.search import plan
from qwen_ray.sizing import plan_request
from qwen_ray.source.config_file import load_config
from qwen_ray.source.purpose import load_purpose
from qwen_ray.source.resolve import resolve
from qwen_ray.text.choice import Choice, Piece
from qwen_ray.text.retrieval import PairPrompt, instructed
from qwen_ray.text.tokenizer import Tokenizer
from qwen_ray.worker.local import LocalExecutor

Prompt = str | Sequence[int]  # text, or token ids
Message = Mapping[str, Any]  # as in OpenAI's API: role, content
ShowProgress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One answer. `stop_reason` is the stop string or token id that ended it, None for the model's own end.

    `reasoning` is what the model thought before it answered a conversation; what continues a prompt is all in `text`.
    """

    index: int
    text: str
    reasoning: str = ""
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """The `n` answers to one prompt. `prompt` is None when ids were given."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0


class LLM:
    """One model in this process.

    `options` are the flags of `qwen-ray serve` with underscores: `dtype`, `max_model_len`, `load_format`,
    `kv_cache_memory`, … In their place, whole `settings` can be given. Raises SettingsError, SourceError,
    CheckpointError or PlanRefused. Not for several threads at once. Use it as a context manager, or `close()` it.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        settings: Settings | None = None,
        on_progress: ShowProgress = lambda what, done, total: None,
        **options: Any,
    ) -> None:
        settings = _settings(model, settings, options)
        wish = settings.models[0]
        path = resolve(
            wish.source,
            settings.cache_dir,
            revision=wish.revision,
            on_progress=lambda done, total, what: on_progress(what, done, total),
        )
        self._purpose = load_purpose(path, wish.task)
        config = self._purpose.applied(load_config(path))
        chosen = plan(plan_request(settings, wish, config, this_machine(), dp=1)).require()
        self.spec = chosen.replica_spec(name=wish.name, path=str(path), load_format=wish.load_format)
        self.tokenizer = Tokenizer.load(path, wish.load_format)
        self._end_tokens = tuple(dict.fromkeys((*config.eos_token_ids, *self.tokenizer.eos_token_ids)))
        self._compiler: GrammarCompiler | None = None
        self._executor = LocalExecutor(
            self.spec, on_progress=lambda done, total: on_progress("loading weights", done, total)
        )
        self._engine = _EngineThread(self.spec.engine, self._executor)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt; answers in the order of the prompts. One SamplingParams for all, or one for each.

        Raises InvalidRequest, ContextLengthExceeded or RequestFailed; then none of the prompts is continued further.
        """
        many = _prompt_list(prompts)
        sampling = _one_each(sampling_params, len(many))
        return self._answer([self._to_job(prompt, params) for prompt, params in zip(many, sampling, strict=True)])

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Message] | None = None,
        **template_variables: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several. Raises as `generate` does.

        `template_variables` are switches of the model's chat template: `enable_thinking=False` for Qwen3.
        """
        many: Sequence[Any] = [messages] if messages and isinstance(messages[0], Mapping) else messages
        texts = [self.tokenizer.render_chat(one, tools, **template_variables) for one in many]
        sampling = _one_each(sampling_params, len(texts))
        jobs = [self._to_job(text, params, is_chat=True) for text, params in zip(texts, sampling, strict=True)]
        return self._answer(jobs)

    def stream(
        self, prompt: Prompt | Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[str]:
        """The text of one answer (to a prompt, or to a conversation) as it comes, without what is thought before."""
        return (piece.text for piece in self.stream_pieces(prompt, sampling_params) if piece.text)

    def stream_pieces(
        self, prompt: Prompt | Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[Piece]:
        """The same with all that is known of it: `reasoning` beside `text`, token ids, log-probabilities."""
        sampling = replace(sampling_params or SamplingParams(), n=1)
        if prompt and isinstance(prompt[0], Mapping):
            text = self.tokenizer.render_chat(prompt)  # pyright: ignore[reportArgumentType]
            job = self._to_job(text, sampling, is_chat=True)
        else:
            job = self._to_job(_prompt_list(prompt)[0], sampling)  # pyright: ignore[reportArgumentType]
        for _, piece in self._engine.run(job.choices):
            yield piece

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, instruction: str | None = None, dimensions: int | None = None
    ) -> list[list[float]]:
        """A vector for every prompt. `instruction` is for queries: what they look for. Raises as `generate` does."""
        self._check_task("embed")
        config, size = self._purpose.embedding, self.spec.config.hidden_size
        if dimensions is not None and not 1 <= dimensions <= size:
            raise InvalidRequest(f"dimensions must be between 1 and {size}, got {dimensions}.", param="dimensions")
        before = config.prompts.get(config.default_prompt_name or "", "")
        before = before if instruction is None else instructed("", instruction)
        ids = [self.tokenizer.encode(before + p) if isinstance(p, str) else p for p in _prompt_list(prompts)]
        vectors = self._pool(ids, Pooling())
        return [shaped(to_floats(v), dimensions=dimensions, normalizes=config.normalizes).tolist() for v in vectors]

    def score(self, query: str, documents: Sequence[str], *, instruction: str | None = None) -> list[float]:
        """How likely each document answers the query: asked as Qwen3's rerankers are. Raises as `generate` does."""
        self._check_task("generate", "score")
        question = PairPrompt.of(self.tokenizer)
        ids = [question.ids(query, document, instruction=instruction) for document in documents]
        pooling = Pooling(token_ids=(question.yes_id, question.no_id))
        return [sigmoid(yes - no) for yes, no in map(to_floats, self._pool(ids, pooling))]

    def stats(self) -> tuple[EngineStats, RankStats]:
        return self._engine.stats(), self._executor.stats()

    def close(self) -> None:
        """Stop the engine and free the model; a second call does nothing."""
        self._engine.close()
        self._executor.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _to_job(self, prompt: Prompt, sampling: SamplingParams, *, is_chat: bool = False) -> _Job:
        """A rendered chat brings its own special tokens, and its answer may begin with thinking."""
        self._check_task("generate")
        if sampling.grammar is not None:
            grammar = self._checked(sampling.grammar)
            sampling = replace(sampling, grammar=replace(grammar, after_thinking=is_chat))
        text = prompt if isinstance(prompt, str) else None
        ids = self.tokenizer.encode(prompt, not is_chat) if isinstance(prompt, str) else tuple(prompt)
        # With a grammar, ignore_eos is the engine's business: it knows when nothing else is left.
        ends = () if sampling.ignore_eos and sampling.grammar is None else self._end_tokens
        request = GenerateRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=tuple(ids),
            sampling=self.tokenizer.with_thinking(sampling, ids),
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            stop_token_ids=tuple(dict.fromkeys((*ends, *sampling.stop_token_ids))),
            arrival=time.time(),
        )
        choices = [
            Choice(i, one, sampling.stop, self.tokenizer, splits_thinking=is_chat)
            for i, one in enumerate(request.choices())
        ]
        return _Job(prompt=text, choices=choices)

    def _checked(self, grammar: Grammar) -> Grammar:
        """Raises InvalidRequest for one that cannot be used."""
        if not self._end_tokens:
            message = "This model has no token to end a text with, so that it cannot follow a grammar."
            raise InvalidRequest(message, param="grammar")
        if self._compiler is None:
            self._compiler = GrammarCompiler(self.tokenizer, self.spec.config.vocab_size)
        error, text = tried(self._compiler, grammar)
        if error is not None:
            raise InvalidRequest(f"grammar: {error}", param="grammar")
        return replace(grammar, text=text)

    def _pool(self, prompts: Sequence[Sequence[int]], pooling: Pooling) -> list[bytes]:
        requests = [
            GenerateRequest(
                request_id=uuid.uuid4().hex,
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(),
                seed=0,
                arrival=time.time(),
                pooling=pooling,
            )
            for prompt in prompts
        ]
        choices = [Choice(i, request, (), self.tokenizer) for i, request in enumerate(requests)]
        pooled = {choice.index: piece.pooled for choice, piece in self._engine.run(choices)}
        return [pooled[i] for i in range(len(choices))]

    def _check_task(self, *tasks: Task) -> None:
        if self._purpose.task not in tasks:
            message = f"This model was loaded with task={self._purpose.task!r}; needed is {' or '.join(tasks)}."
            raise InvalidRequest(message, param="task", code="unsupported_task")

    def _answer(self, jobs: list[_Job]) -> list[RequestOutput]:
        pieces: dict[str, list[Piece]] = {c.request.request_id: [] for job in jobs for c in job.choices}
        for choice, piece in self._engine.run([choice for job in jobs for choice in job.choices]):
            pieces[choice.request.request_id].append(piece)
        return [
            RequestOutput(
                prompt=job.prompt,
                prompt_token_ids=job.choices[0].request.prompt_token_ids,
                outputs=tuple(_output(c, pieces[c.request.request_id]) for c in job.choices),
                prompt_logprobs=tuple(
                    entry for piece in pieces[job.choices[0].request.request_id] for entry in piece.prompt_logprobs
                ),
                num_cached_tokens=job.choices[0].num_cached_tokens,
            )
            for job in jobs
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    prompt: str | None
    choices: list[Choice]


class _EngineThread:
    """An engine on an event loop in a thread of its own, and its deltas handed back to the caller's thread."""

    def __init__(self, config: EngineConfig, executor: Executor) -> None:
        self._num_at_once = config.max_num_waiting
        self._deltas: queue.SimpleQueue[list[TokenDelta] | QwenRayError] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._engine = Engine(config, executor, self._deltas.put)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def run(self, choices: Sequence[Choice]) -> Iterator[tuple[Choice, Piece]]:
        """Continue all of them; the pieces in the order in which they come. Leaves nothing in the engine."""
        open_choices: dict[str, Choice] = {}
        pending = deque(choices)
        try:
            while pending or open_choices:
                while pending and len(open_choices) < self._num_at_once:
                    choice = pending.popleft()
                    open_choices[choice.request.request_id] = choice
                    self._on_loop(self._engine.add, choice.request)
                for delta in self._next_deltas():
                    choice = open_choices.get(delta.request_id)
                    if choice is None:
                        continue
                    if delta.finish_reason == "error":
                        raise RequestFailed(delta.error or "the engine failed")
                    piece = choice.push(delta)
                    if piece.finish_reason is not None:
                        del open_choices[delta.request_id]
                        if delta.finish_reason is None:  # a stop string, which the engine cannot see
                            self._on_loop(self._engine.abort, delta.request_id)
                    yield choice, piece
        finally:
            for request_id in open_choices:
                self._on_loop(self._engine.abort, request_id)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._engine.stop)
            self._thread.join()

    def _next_deltas(self) -> list[TokenDelta]:
        deltas = self._deltas.get()
        if isinstance(deltas, QwenRayError):
            raise RequestFailed(str(deltas)) from deltas
        return deltas

    def _on_loop(self, call: Callable[..., None], argument: object) -> None:
        """Run `call(argument)` where the engine lives, and wait for it. Its errors are raised here."""

        async def run() -> None:
            call(argument)

        if not self._thread.is_alive():
            raise RequestFailed("The engine has stopped.")
        asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def _work(self) -> None:
        try:
            self._loop.run_until_complete(self._engine.run())
        except QwenRayError as error:
            self._deltas.put(error)
        finally:
            self._loop.close()


def _settings(model: str | None, settings: Settings | None, options: Mapping[str, Any]) -> Settings:
    if settings is not None:
        if model is not None or options:
            raise SettingsError("Give either settings, or a model and options.")
        return settings
    flags = {name.replace("_", "-"): value for name, value in options.items()}
    if unknown := sorted(flags.keys() - OPTIONS.keys()):
        raise SettingsError(f"{unknown[0].replace('-', '_')}: unknown option of LLM.", field=unknown[0])
    return load_settings(None, {"model": model, **flags})


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # pyright: ignore[reportReturnType]
    return list(prompts)  # pyright: ignore[reportReturnType, reportArgumentType]


def _one_each(sampling: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling or SamplingParams()] * count
    if len(sampling) != count:
        raise InvalidRequest(f"{count} prompts, but {len(sampling)} SamplingParams.", param="sampling_params")
    return list(sampling)


def _output(choice: Choice, pieces: Sequence[Piece]) -> CompletionOutput:
    return CompletionOutput(
        index=choice.index,
        text="".join(piece.text for piece in pieces),
        reasoning="".join(piece.reasoning for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        finish_reason=choice.finish_reason or "",
        stop_reason=pieces[-1].stop_reason,
        logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
    )
