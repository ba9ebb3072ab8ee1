"""The rank's shell without Ray: a worker that computes nothing, and a real channel to it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import ClassVar

import pytest

from qwen_ray.cluster import actor as actor_module
from qwen_ray.cluster.actor import RankActor
from qwen_ray.cluster.channel import Channel, listen
from qwen_ray.cluster.placement import environment, rank_resources
from qwen_ray.cluster.rank_messages import RANK_CODEC, Failed, Hello, Progress, RankMessage, Released, Stop
from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.model_config import ModelConfig, MoeConfig, RopeConfig
from qwen_ray.core.plan import EngineConfig, ParallelPlan, Rendezvous, ReplicaSpec
from qwen_ray.core.stats import RankStats
from qwen_ray.core.step import MoveExperts, StepBatch, StepResult

SECRET = b"s" * 32
MEETING = Rendezvous(address="127.0.0.1:1", name="m")
CONFIG = ModelConfig(
    architecture="qwen2",
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=4,
    rms_norm_eps=1e-6,
    rope=RopeConfig(),
    max_position_embeddings=8,
    tie_word_embeddings=True,
    qkv_bias=True,
    qk_norm=False,
)
SPEC = ReplicaSpec(
    name="stub",
    path="good",
    config=CONFIG,
    plan=ParallelPlan.of(CONFIG, tp=2),
    engine=EngineConfig(num_blocks=1),
    dtype="float32",
    num_threads=3,
)


class Stub:
    """Answers even steps, not odd ones; step 13 and moving layer 13 raise. Counts steps and moves."""

    closed: ClassVar[list[str]] = []  # paths of those that were closed

    def __init__(self, spec: ReplicaSpec, rank: int, rendezvous: Rendezvous) -> None:
        self._path = spec.path
        self._num_steps = 0
        self._moved: list[tuple[int, int]] = []  # (steps before it, layer)

    def join(self) -> None: ...

    def load(self, on_progress: Callable[[int, int], None]) -> None:
        if self._path == "bad":
            raise CheckpointError("no such tensor")
        for done in range(1001):
            on_progress(done, 1000)

    def allocate(self) -> None: ...

    def execute(self, batch: StepBatch) -> StepResult | None:
        if batch.step_id == 13:
            raise ValueError("unlucky")
        self._num_steps += 1
        return None if batch.step_id % 2 else StepResult(step_id=batch.step_id)

    def move_experts(self, move: MoveExperts) -> None:
        if move.layer == 13:
            raise ValueError("not there")
        self._moved.append((self._num_steps, move.layer))

    def stats(self) -> RankStats:
        return RankStats(
            rank=1,
            stage=0,
            tp_rank=1,
            pid=1,
            node="",
            device="cpu",
            num_steps=self._num_steps,
            expert_tokens=tuple(self._moved),
        )

    def close(self) -> None:
        self.closed.append(self._path)


class NoTimer:
    """In place of the one that would end this very process."""

    armed: ClassVar[list[tuple[float, object]]] = []
    daemon = False

    def __init__(self, seconds: float, function: object, args: tuple[int]) -> None:
        self.armed.append((seconds, function))

    def start(self) -> None: ...


@pytest.fixture(autouse=True)
def no_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_module.threading, "Timer", NoTimer)
    monkeypatch.setattr(NoTimer, "armed", [])
    monkeypatch.setattr(Stub, "closed", [])


MakeRank = Callable[[ReplicaSpec, int], RankActor]


@pytest.fixture
def make_rank() -> Iterator[MakeRank]:
    """Ranks keep their socket until their process ends, which this one does not: here they are closed by hand."""
    ranks: list[RankActor] = []

    def make(spec: ReplicaSpec, rank: int) -> RankActor:
        ranks.append(RankActor(spec, rank, f"{__name__}:Stub"))
        return ranks[-1]

    yield make
    for rank in ranks:
        rank._need_channel().close()
        rank._thread.shutdown()


@pytest.fixture
async def address() -> AsyncIterator[tuple[str, asyncio.Queue[Channel[RankMessage]]]]:
    """A listener, and the channels that come in."""
    channels: asyncio.Queue[Channel[RankMessage]] = asyncio.Queue()
    done = asyncio.Event()

    async def handler(channel: Channel[RankMessage]) -> None:
        channels.put_nowait(channel)
        await done.wait()

    listener = await listen("127.0.0.1", SECRET, handler, RANK_CODEC)
    yield listener.address, channels
    await listener.close()


Address = tuple[str, asyncio.Queue[Channel[RankMessage]]]


async def start(make_rank: MakeRank, address: Address) -> tuple[RankActor, Channel[RankMessage]]:
    """A rank that serves, and the replica's end of its channel, after the first messages."""
    rank = make_rank(SPEC, 1)
    await asyncio.to_thread(rank.connect, address[0], SECRET)
    channel = await address[1].get()
    assert await anext(channel) == Hello(rank=1)
    assert rank.stats().tp_rank == 1  # before there is a worker
    for call in (lambda: rank.join(MEETING), rank.load, rank.allocate, rank.serve):
        await asyncio.to_thread(call)
    progress = [await anext(channel)]
    while progress[-1] != Progress(done=1000, total=1000):
        progress.append(await anext(channel))
    assert len(progress) < 20  # of 1001 reports: a channel is not flooded
    return rank, channel


async def test_steps_in_order_then_stop(make_rank: MakeRank, address: Address) -> None:
    rank, channel = await start(make_rank, address)
    for number in range(6):
        channel.send(StepBatch(step_id=number, chunks=()))
    assert [await anext(channel) for _ in range(3)] == [StepResult(step_id=n) for n in (0, 2, 4)]
    channel.send(Stop())
    assert await anext(channel) == Released()
    assert rank.stats().num_steps == 6
    assert [(seconds, function is os._exit) for seconds, function in NoTimer.armed] == [(10.0, True)]


async def test_step_that_raises_is_reported_once_and_the_rank_lives_on(make_rank: MakeRank, address: Address) -> None:
    rank, channel = await start(make_rank, address)
    for number in (2, 13, 13, 4):
        channel.send(StepBatch(step_id=number, chunks=()))
    assert await anext(channel) == StepResult(step_id=2)
    assert await anext(channel) == Failed(reason="ValueError: unlucky")
    assert rank.stats().num_steps == 1
    channel.send(Stop())
    assert await anext(channel) == Released()


async def test_experts_move_between_the_steps_that_they_were_sent_between(
    make_rank: MakeRank, address: Address
) -> None:
    rank, channel = await start(make_rank, address)
    messages = (
        StepBatch(step_id=2, chunks=()),
        MoveExperts(layer=5, slots=((0,), (1,))),
        StepBatch(step_id=4, chunks=()),
    )
    for message in messages:
        channel.send(message)
    assert [await anext(channel) for _ in range(2)] == [StepResult(step_id=2), StepResult(step_id=4)]
    assert rank.stats().expert_tokens == ((1, 5),)
    channel.send(MoveExperts(layer=13, slots=()))
    channel.send(StepBatch(step_id=6, chunks=()))
    assert await anext(channel) == Failed(reason="ValueError: not there")
    channel.send(Stop())
    assert await anext(channel) == Released()
    assert rank.stats().num_steps == 2


async def test_before_it_has_a_worker_a_rank_knows_its_place(make_rank: MakeRank, address: Address) -> None:
    moe = MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True)
    config = replace(CONFIG, num_hidden_layers=2, moe=moe)
    spec = replace(SPEC, config=config, plan=ParallelPlan.of(config, tp=2, pp=2, ep=2, dp_attention=2))
    rank = make_rank(spec, 7)
    await asyncio.to_thread(rank.connect, address[0], SECRET)
    stats = rank.stats()
    assert (stats.rank, stats.stage, stats.dp_rank, stats.tp_rank) == (7, 1, 1, 1)
    assert (stats.ep_rank, stats.expert_tp_rank, stats.first_layer) == (1, 1, 1)


async def test_end_of_the_replica_ends_the_rank(make_rank: MakeRank, address: Address) -> None:
    rank, channel = await start(make_rank, address)
    channel.close()
    await asyncio.to_thread(rank._thread.shutdown)
    assert Stub.closed == ["good"]
    assert len(NoTimer.armed) == 1


async def test_what_loading_raises_comes_out_as_it_is(make_rank: MakeRank, address: Address) -> None:
    rank = make_rank(replace(SPEC, path="bad"), 0)
    await asyncio.to_thread(rank.connect, address[0], SECRET)
    rank.join(MEETING)
    with pytest.raises(CheckpointError, match="no such tensor"):
        rank.load()


def test_a_rank_on_cpu_claims_little_and_spins_briefly() -> None:
    assert 6 * rank_resources(SPEC)["CPU"] < 0.5
    assert environment(SPEC)["OMP_NUM_THREADS"] == "3"
    assert environment(SPEC)["GOMP_SPINCOUNT"] == "20000"
