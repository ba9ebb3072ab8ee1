"""Replicas that die when they are told to, drain or hang, behind channels without sockets. Not a test.

The engine, the sampler and the sessions are the real ones; only logits are made up, out of a sequence's tokens alone.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from qwen_ray.cluster.directory import Entry
from qwen_ray.cluster.wire import ChannelClosed
from qwen_ray.core.errors import RankFailed
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.request import GenerateRequest, TokenDelta
from qwen_ray.core.step import PromptLogprobs, StepBatch, StepResult
from qwen_ray.engine.engine import Engine
from qwen_ray.grammar.matcher import GrammarCompiler
from qwen_ray.serving.messages import CODEC, Answer, Ask, ReplicaState, ReplicaStatus
from qwen_ray.serving.sessions import Sessions
from qwen_ray.worker.grammars import GrammarMasks
from qwen_ray.worker.sampler import describe, sample
from qwen_ray.worker.sequences import SequenceTable

Fate = Literal["dies", "drains", "hangs"]
Recitals = Mapping[tuple[int, ...], Sequence[int]]  # what is said to a prompt, where it matters


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    """What happens to a replica in its life: after `num_deltas`, of which the last `num_lost` never arrive."""

    fate: Fate
    num_deltas: int
    num_lost: int = 0


class Wire:
    """One end of a channel: what `Channel` does, by way of the codec, without a socket."""

    def __init__(self) -> None:
        self.reason = ""
        self.is_closed = False
        self.other: Wire = self
        self._inbox: asyncio.Queue[bytes | None] = asyncio.Queue()

    @classmethod
    def pair(cls) -> tuple[Wire, Wire]:
        one, two = cls(), cls()
        one.other, two.other = two, one
        return one, two

    def send(self, message: Any) -> None:
        if self.is_closed:
            raise ChannelClosed("closed")
        self.other._inbox.put_nowait(CODEC.encode(message)[4:])

    def close(self) -> None:
        for end in (self, self.other):
            if not end.is_closed:
                end.is_closed = True
                end._inbox.put_nowait(None)

    def __aiter__(self) -> Wire:
        return self

    async def __anext__(self) -> Any:
        payload = await self._inbox.get()
        if payload is None:
            raise StopAsyncIteration
        return CODEC.decode(payload)


class MadeUpRanks:
    """Logits that depend on the tokens before them and on nothing else."""

    def __init__(
        self,
        vocab_size: int,
        likely: Sequence[int],
        recitals: Recitals,
        compiler: GrammarCompiler | None = None,
    ) -> None:
        self._recitals = recitals
        self._grammars = GrammarMasks(lambda: compiler)
        self._vocab_size = vocab_size
        self._likely = list(likely)
        self._table = SequenceTable()
        self.hang: asyncio.Event | None = None

    async def submit(self, batch: StepBatch) -> StepResult:
        if self.hang is not None:
            await self.hang.wait()
            raise RankFailed(0, "it hung")
        await asyncio.sleep(0)
        states = self._table.apply(batch)
        ends = [
            state
            for state, chunk in zip(states, batch.chunks, strict=True)
            if chunk.start + chunk.count == state.num_tokens
        ]
        rows = torch.stack([self.logits(state.token_ids) for state in ends]) if ends else torch.empty(0, 1)
        of_prompts: list[PromptLogprobs] = []
        for state, chunk in zip(states, batch.chunks, strict=True):
            last = min(chunk.start + chunk.count, state.num_prompt_tokens - 1)
            if state.sampling.prompt_logprobs is not None and chunk.start < last:
                tokens = state.token_ids[chunk.start + 1 : last + 1].tolist()
                prefixes = [self.logits(state.token_ids[: i + 1]) for i in range(chunk.start, last)]
                entries = describe(torch.stack(prefixes), tokens, [state.sampling.prompt_logprobs] * len(tokens))
                of_prompts.append(
                    PromptLogprobs(sequence_id=state.sequence_id, start=chunk.start + 1, entries=tuple(entries))
                )
        samples = tuple(sample(rows, ends, self._grammars.start(ends).result())) if ends else ()
        return StepResult(step_id=batch.step_id, samples=samples, prompt_logprobs=tuple(of_prompts))

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(repr(list(token_ids)).encode()).digest()[:6], "little")
        logits = torch.randn(self._vocab_size, generator=torch.Generator().manual_seed(seed))
        logits[self._likely] += 4.0
        for prompt, text in self._recitals.items():
            place = len(token_ids) - len(prompt)
            if tuple(token_ids[: len(prompt)]) == prompt and 0 <= place < len(text):
                logits[text[place]] += 99.0
        return logits


class MortalReplica:
    def __init__(self, name: str, ranks: MadeUpRanks, config: EngineConfig, blow: Blow | None = None) -> None:
        self.name = name
        self.state: ReplicaState = "ready"
        self.fingerprint = ""
        self.is_dead = False
        self.requests: list[GenerateRequest] = []
        self.engine = Engine(config, ranks, self._publish)
        self.is_mute = False
        self.sessions = Sessions(self._add, self.engine.abort, self.status, self._answer)
        self._ranks = ranks
        self._blow = blow
        self._num_deltas = 0
        self._wires: list[Wire] = []
        self._tasks = [asyncio.create_task(self.engine.run()), asyncio.create_task(self._push())]

    @property
    def entry(self) -> Entry:
        return Entry(kind="replica", id=self.name, app="", address="", secret=b"", state="ready")

    def connect(self) -> Wire:
        if self.is_dead:
            raise ChannelClosed("nobody there")
        ours, theirs = Wire.pair()
        self._wires.append(ours)
        serving: Any = self.sessions.handle(ours)  # pyright: ignore[reportArgumentType]
        self._tasks.append(asyncio.create_task(serving))
        return theirs

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
            stalled_seconds=5.0 if self._ranks.hang is not None else 0.0,
            fingerprint=self.fingerprint,
        )

    @property
    def holds_something(self) -> bool:
        """Blocks, though it lives and could give them back."""
        return not self.is_dead and self._ranks.hang is None and self.engine.stats().num_used_blocks > 0

    async def stop(self) -> None:
        self.die()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def die(self) -> None:
        self.is_dead = True
        for wire in self._wires:
            wire.close()

    def _add(self, request: GenerateRequest) -> None:
        self.requests.append(request)
        self.engine.add(request)

    def _publish(self, deltas: list[TokenDelta]) -> None:
        before, self._num_deltas = self._num_deltas, self._num_deltas + len(deltas)
        blow = self._blow
        if blow is None or self.is_dead or self._num_deltas < blow.num_deltas:
            self.sessions.publish(deltas)
            return
        self._blow = None
        if blow.fate == "dies":
            self.sessions.publish(deltas[: max(0, blow.num_deltas - blow.num_lost - before)])
            self.die()
        elif blow.fate == "drains":
            self.sessions.publish(deltas)
            self.state = "draining"
            self.sessions.push(self.status())
        else:
            self.sessions.publish(deltas)
            self._ranks.hang = asyncio.Event()
            self.sessions.push(self.status())

    async def _push(self) -> None:
        while not self.is_dead:
            await asyncio.sleep(0.005)
            if not self.is_mute:
                self.sessions.push(self.status())

    async def _answer(self, ask: Ask) -> Answer:
        return Answer(ask_id=ask.ask_id, status=self.status())


class Population:
    """As many replicas as wanted at any time: who is gone is replaced, as Serve does. `blows` fall in their order."""

    def __init__(
        self,
        size: int,
        blows: Sequence[Blow],
        config: EngineConfig,
        vocab_size: int,
        likely: Sequence[int],
        recitals: Recitals | None = None,
        compiler: GrammarCompiler | None = None,
    ) -> None:
        self._compiler = compiler
        self.replicas: list[MortalReplica] = []
        self._size = size
        self._blows = list(blows)
        self._config = config
        self._vocab_size, self._likely, self._recitals = vocab_size, likely, recitals or {}

    async def find(self) -> list[Entry]:
        for replica in self.replicas:
            if replica.state == "draining" and replica._wires and not replica.sessions._channels:
                replica.die()  # all have let go of it
        healthy = [r for r in self.replicas if not r.is_dead and r.state == "ready" and r._ranks.hang is None]
        for _ in range(self._size - len(healthy)):
            self.add()
        return [replica.entry for replica in self.replicas if not replica.is_dead]

    def add(self, *, state: ReplicaState = "ready", fingerprint: str = "") -> MortalReplica:
        ranks = MadeUpRanks(self._vocab_size, self._likely, self._recitals, self._compiler)
        blow = self._blows.pop(0) if self._blows else None
        replica = MortalReplica(f"replica-{len(self.replicas)}", ranks, self._config, blow)
        replica.state, replica.fingerprint = state, fingerprint
        self.replicas.append(replica)
        return replica

    async def connect(self, entry: Entry) -> Any:
        await asyncio.sleep(0)
        return next(replica for replica in self.replicas if replica.name == entry.id).connect()

    async def stop(self) -> None:
        for replica in self.replicas:
            await replica.stop()
