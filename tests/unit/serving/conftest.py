"""A whole server in one process: real HTTP, real channels, the real engine, and ranks that recite a text."""

from __future__ import annotations

import asyncio
import secrets
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from qwen_ray.cluster.channel import Channel, Listener, connect, listen
from qwen_ray.cluster.directory import Entry
from qwen_ray.config import HttpSettings
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.pooling import Pooling
from qwen_ray.core.request import GenerateRequest, TokenDelta, TokenLogprobs
from qwen_ray.core.step import NewSequence, PromptLogprobs, Sample, StepBatch, StepResult
from qwen_ray.engine.engine import Engine
from qwen_ray.engine.executor import Executor
from qwen_ray.grammar.checker import GrammarChecker
from qwen_ray.metrics.exporter import exposition
from qwen_ray.metrics.recorder import IngressRecorder, ReplicaRecorder
from qwen_ray.serving.audit import AuditLog
from qwen_ray.serving.dispatch import Dispatcher
from qwen_ray.serving.fleet import Fleet
from qwen_ray.serving.generation import Generator, Model
from qwen_ray.serving.keys import KeyRing
from qwen_ray.serving.limits import OpenRequests
from qwen_ray.serving.messages import CODEC, Answer, Ask, ReplicaState, ReplicaStatus
from qwen_ray.serving.routes import Service, create_app
from qwen_ray.serving.sessions import Sessions
from qwen_ray.text.tokenizer import Tokenizer as OurTokenizer
from qwen_ray.tracing import Tracer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>")
EOS = 257
TAGS = ("<think>", "</think>")
VOCAB_SIZE = 258 + len(TAGS)
THOUGHT = "<think>\nGrüße?\n\nAh, 世界.\n</think>\n\nGrüße, 世界! STOP and <b>more</b>.\n"
# Qwen3's; with `opens` it ends within a block, as those do whose models always think.
THINKING_TEMPLATE = (Path(__file__).parents[1] / "text" / "qwen3_chat_template.jinja").read_text() + (
    "{%- if opens is defined %}{{- '<think>\n' }}{%- endif %}"
)
HTTP = HttpSettings(max_body_bytes=200_000)
TEXT = "Grüße, 世界! 👩‍👩‍👧 The end of the line. STOP and more."


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Single bytes, and two special tokens."""
    return write_tokenizer(tmp_path_factory.mktemp("bytes"), TEMPLATE)


def write_tokenizer(path: Path, template: str) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in TAGS])
    backend.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(template)
    (path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> OurTokenizer:
    return OurTokenizer.load(tokenizer_path)


class Reciter:
    """An executor whose sequences all say the same text, then end; the token at a position depends on nothing else."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = [*tokens, EOS]
        self.seconds = 0.0  # of a step
        self.num_steps = 0
        self._known: dict[int, tuple[NewSequence, list[int]]] = {}

    async def submit(self, batch: StepBatch) -> StepResult:
        await asyncio.sleep(self.seconds)
        self.num_steps += 1
        for sequence_id in batch.dropped:
            self._known.pop(sequence_id, None)
        for new in batch.new:
            self._known[new.sequence_id] = (new, list(new.token_ids))
        samples: list[Sample] = []
        of_prompts: list[PromptLogprobs] = []
        for chunk in batch.chunks:
            new, tokens = self._known[chunk.sequence_id]
            tokens.extend(chunk.new_tokens)
            end = chunk.start + chunk.count
            if new.sampling.prompt_logprobs is not None and chunk.start < new.num_prompt_tokens - 1:
                entries = [
                    _logprobs(token, new.sampling.prompt_logprobs) for token in tokens[chunk.start + 1 : end + 1]
                ]
                of_prompts.append(
                    PromptLogprobs(sequence_id=chunk.sequence_id, start=chunk.start + 1, entries=tuple(entries))
                )
            if end == len(tokens) and new.pooling is not None:
                samples.append(Sample(sequence_id=chunk.sequence_id, pooled=pooled(tokens, new.pooling)))
            elif end == len(tokens):
                token = self.tokens[len(tokens) - new.num_prompt_tokens]
                count = new.sampling.logprobs
                logprobs = None if count is None else _logprobs(token, count)
                samples.append(Sample(sequence_id=chunk.sequence_id, token_id=token, logprobs=logprobs))
        return StepResult(step_id=batch.step_id, samples=tuple(samples), prompt_logprobs=tuple(of_prompts))


def pooled(tokens: list[int], pooling: Pooling) -> bytes:
    """Depends on all tokens: a vector of four numbers, or logits."""
    if pooling.token_ids:
        return array("f", [sum(tokens) % 7 + token % 3 for token in pooling.token_ids]).tobytes()
    return array("f", [tokens[0] - 100, tokens[-1] - 100, len(tokens), sum(tokens) % 100]).tobytes()


def _logprobs(token: int, count: int) -> TokenLogprobs:
    top = ((token, -0.25), (65, -2.0), (66, float("-inf")))
    return TokenLogprobs(token_id=token, logprob=-0.25, top=top[:count])


class FakeReplica:
    """As `replica.Replica`, without Serve and Ray."""

    def __init__(self, name: str, tokens: list[int], config: EngineConfig, executor: Executor | None = None) -> None:
        self.name = name
        self.state: ReplicaState = "ready"
        self.ranks = Reciter(tokens)
        self.recorder = ReplicaRecorder("tiny", name)
        self.requests: list[GenerateRequest] = []
        self.engine = Engine(config, executor or self.ranks, self._publish, self.recorder.step, self.recorder.finished)
        self.sessions = Sessions(self._add, self.engine.abort, self.status, self._answer)
        self.channels: list[Channel[Any]] = []
        self.deltas_until_death: int | None = None
        self._secret = secrets.token_bytes(32)
        self._listener: Listener[Any] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> FakeReplica:
        self._listener = await listen("127.0.0.1", self._secret, self._handle, CODEC)
        self._tasks = [asyncio.create_task(self.engine.run()), asyncio.create_task(self._push())]
        return self

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            await self._listener.close()

    @property
    def entry(self) -> Entry:
        assert self._listener is not None
        return Entry(
            kind="replica", id=self.name, app="test", address=self._listener.address, secret=self._secret, state="ready"
        )

    def status(self) -> ReplicaStatus:
        return ReplicaStatus(
            replica=self.name,
            model="tiny",
            state=self.state,
            tp=1,
            pp=1,
            node="here",
            pid=1,
            started=0.0,
            engine=self.engine.stats(),
            stalled_seconds=self.engine.stalled_seconds if self.engine.stalled_seconds > 30 else 0.0,
            stage=self.state,
        )

    def _add(self, request: GenerateRequest) -> None:
        self.requests.append(request)
        self.engine.add(request)

    def _publish(self, deltas: list[TokenDelta]) -> None:
        if self.deltas_until_death is not None:
            self.deltas_until_death -= len(deltas)
            if self.deltas_until_death < 0:  # it dies with tokens that nobody has seen
                self.deltas_until_death = None
                for channel in self.channels:
                    channel.close()
                return
        self.sessions.publish(deltas)

    async def _handle(self, channel: Channel[Any]) -> None:
        self.channels.append(channel)
        await self.sessions.handle(channel)

    async def _answer(self, ask: Ask) -> Answer:
        self.recorder.engine = self.engine.stats()
        if ask.what == "metrics":
            return Answer(ask_id=ask.ask_id, metrics=exposition(self.recorder.registry))
        return Answer(ask_id=ask.ask_id, status=self.status())

    async def _push(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            self.sessions.push(self.status())


class Server:
    """An ingress without Serve, its replicas, and a client."""

    def __init__(
        self,
        tokenizer: OurTokenizer,
        config: EngineConfig,
        text: str = TEXT,
        http: HttpSettings = HTTP,
        audit: AuditLog | None = None,
        tracer: Tracer | None = None,
        about: dict[str, Any] | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.executor = executor  # in place of ranks that recite
        self.about = about or {}  # more fields of the Model
        self.tokenizer = tokenizer
        self.config = config
        self.text = text  # what its replicas say
        self.http = http
        self.audit = audit
        self.tracer = tracer
        self.replicas: list[FakeReplica] = []
        self.grammars = GrammarChecker(Path("nowhere"), "dummy", VOCAB_SIZE)  # single bytes, as its model's
        self.other_ingresses: list[Entry] = []
        self.recorder = IngressRecorder("tiny", "one")
        self.dispatcher = Dispatcher(self._find, self._connect, self.recorder.hand_over)
        self.url = ""
        self.client = httpx.AsyncClient()
        self._http: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self, num_replicas: int) -> Server:
        for number in range(num_replicas):
            await self.add_replica(f"replica-{number}")
        await self.dispatcher.start()
        self.recorder.watch(lambda: (self.dispatcher.num_sequences, 0, {"ready": len(self.dispatcher.links)}))
        model = Model(
            name="tiny",
            source="nowhere",
            created=1,
            fingerprint="fp_test",
            vocab_size=self.tokenizer.vocab_size,
            max_model_len=self.config.max_model_len,
            eos_token_ids=(EOS,),
            **self.about,
        )
        fleet = Fleet("one", self.dispatcher, self.recorder, self._find_ingresses, self._connect)
        self.service = Service(
            generator=Generator(model, self.tokenizer, self.dispatcher, self.recorder, self.grammars),
            dispatcher=self.dispatcher,
            recorder=self.recorder,
            fleet=fleet,
            keys=KeyRing(self.http),
            open_requests=OpenRequests(self.http.max_open_requests),
            max_body_bytes=self.http.max_body_bytes,
            audit=self.audit,
            tracer=self.tracer,
        )
        config = uvicorn.Config(create_app(self.service), host="127.0.0.1", port=0, log_level="warning", lifespan="off")
        self._http = uvicorn.Server(config)
        self._serving = asyncio.create_task(self._http.serve())
        await self.until(lambda: self._http is not None and self._http.started)
        port = self._http.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.AsyncClient(base_url=self.url, timeout=20)
        await self.until(lambda: len(self.dispatcher.statuses) == num_replicas)
        return self

    async def add_replica(self, name: str) -> FakeReplica:
        replica = await FakeReplica(name, self.tokenizer.encode(self.text), self.config, self.executor).start()
        self.replicas.append(replica)
        return replica

    async def stop(self) -> None:
        await self.client.aclose()
        await self.dispatcher.close()
        await self.grammars.close()
        for replica in self.replicas:
            await replica.stop()
        if self._http is not None and self._serving is not None:
            self._http.should_exit = True
            await self._serving

    def is_idle(self) -> bool:
        """Nothing runs, and every block is free."""
        engines = [replica.engine.stats() for replica in self.replicas]
        return not self.dispatcher.num_sequences and all(
            engine.num_running + engine.num_waiting + engine.num_used_blocks == 0 for engine in engines
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 (what is waited for is told to nobody)
                await asyncio.sleep(0.005)

    async def until_status(self, path: str, status: int) -> httpx.Response:
        async with asyncio.timeout(10):
            while (response := await self.client.get(path)).status_code != status:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return response

    async def _find(self) -> list[Entry]:
        return [replica.entry for replica in self.replicas]

    async def _find_ingresses(self) -> list[Entry]:
        return self.other_ingresses

    async def _connect(self, entry: Entry) -> Channel[Any]:
        return await connect(entry.address, entry.secret, CODEC)


@pytest.fixture
def engine_config() -> EngineConfig:
    return EngineConfig(num_blocks=200, block_size=4, max_model_len=400, max_num_waiting=8, max_num_seqs=8)


@pytest.fixture
async def server(tokenizer: OurTokenizer, engine_config: EngineConfig) -> AsyncIterator[Server]:
    server = Server(tokenizer, engine_config)
    await server.start(num_replicas=1)
    yield server
    await server.stop()


@pytest.fixture
async def start_server(
    tokenizer: OurTokenizer, engine_config: EngineConfig
) -> AsyncIterator[Callable[..., Awaitable[Server]]]:
    """For servers with settings of their own: the arguments of Server, of which the second is given."""
    started: list[Server] = []

    async def start(*, num_replicas: int = 1, **options: Any) -> Server:
        started.append(Server(config=engine_config, **{"tokenizer": tokenizer, **options}))
        return await started[-1].start(num_replicas)

    yield start
    for server in started:
        await server.stop()


@pytest.fixture
async def pair(tokenizer: OurTokenizer, engine_config: EngineConfig) -> AsyncIterator[Server]:
    """Two replicas."""
    server = Server(tokenizer, engine_config)
    await server.start(num_replicas=2)
    yield server
    await server.stop()


@pytest.fixture(scope="session")
def thinking_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> OurTokenizer:
    return OurTokenizer.load(write_tokenizer(tmp_path_factory.mktemp("thinking"), THINKING_TEMPLATE))


@pytest.fixture
async def thinkers(thinking_tokenizer: OurTokenizer, engine_config: EngineConfig) -> AsyncIterator[Server]:
    """Two replicas of a model that thinks."""
    server = Server(thinking_tokenizer, engine_config, THOUGHT)
    await server.start(num_replicas=2)
    yield server
    await server.stop()
