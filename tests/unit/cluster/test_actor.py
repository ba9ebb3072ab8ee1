"""The rank's shell without Ray: a worker that computes nothing, and a real channel to it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import ClassVar

import pytest

from qwen_ray.cluster import actor as actor_module
from qwen_ray.cluster.actor import RankActor
from qwen_ray.cluster.channel import Channel, listen
from qwen_ray.cluster.placement import environment, rank_resources
from qwen_ray.cluster.rank_messages import (
    RANK_CODEC,
    Beat,
    ExpertSlots,
    Failed,
    Hello,
    Join,
    Joined,
    Pause,
    Paused,
    Progress,
    RankMessage,
    Released,
    Stop,
)
from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.model_config import ModelConfig, MoeConfig, RopeConfig
from qwen_ray.core.plan import EngineConfig, ExpertPlacement, ParallelPlan, Rendezvous, ReplicaSpec
from qwen_ray.core.stats import RankStats
from qwen_ray.core.step import MoveExperts, StepBatch, StepResult

SECRET = b"s" * 32
JOIN = Join(address="127.0.0.1:1", name="first", warm_up=True)
JOIN_AGAIN = Join(address="127.0.0.1:1", name="second", warm_up=False)
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
    """Answers even steps, not odd ones; steps from 13 on and moving layer 13 raise. Counts steps and moves."""

    closed: ClassVar[list[str]] = []  # paths of those that were closed

    def __init__(self, spec: ReplicaSpec, rank: int) -> None:
        self._path = spec.path
        self._experts = spec.plan.experts
        self._num_steps = 0
        self._moved: list[tuple[int, int]] = []  # (steps before it, layer)
        self._met: list[str] = []
        self.is_waiting = False
        self._is_aborted = threading.Event()

    def load(self, on_progress: Callable[[int, int], None]) -> None:
        if self._path == "bad":
            raise CheckpointError("no such tensor")
        for done in range(1001):
            on_progress(done, 1000)

    def join(self, rendezvous: Rendezvous) -> None:
        if rendezvous.address == "nowhere":
            raise ConnectionError("nobody came")
        self._is_aborted.clear()
        self._met.append(rendezvous.name)

    def warm_up(self) -> int:
        self._met.append("warm")
        return 5

    def execute(self, batch: StepBatch) -> StepResult | None:
        if batch.step_id == 13:
            raise ValueError("unlucky")
        if batch.step_id == 14:
            raise ValueError("CUDA error")
        if batch.step_id == 15:
            self.is_waiting = True
            assert self._is_aborted.wait(20)
            raise ConnectionAbortedError("aborted")
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
            device="cpu",
            num_steps=self._num_steps,
            expert_tokens=tuple(self._moved),
            node=" ".join(self._met),
        )

    def expert_slots(self) -> ExpertSlots:
        return {} if self._experts is None else dict(enumerate(self._experts.slots))

    def survives(self, error: Exception) -> bool:
        return "CUDA" not in str(error)

    def abort(self) -> None:
        self._is_aborted.set()

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
    monkeypatch.setattr(actor_module, "BEAT_SECONDS", 0.01)


MakeRank = Callable[[], RankActor]


@pytest.fixture
def make_rank() -> Iterator[MakeRank]:
    """Ranks keep their socket until their process ends, which this one does not: here they are closed by hand."""
    ranks: list[RankActor] = []

    def make() -> RankActor:
        ranks.append(RankActor(f"{__name__}:Stub"))
        return ranks[-1]

    yield make
    for rank in ranks:
        assert rank._channel is not None
        rank._channel.close()
        if rank._worker is not None:
            rank._worker.abort()
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


async def next_news(channel: Channel[RankMessage]) -> RankMessage:
    """The next message that is no heartbeat."""
    while isinstance(message := await anext(channel), Beat):
        pass
    return message


async def start(
    make_rank: MakeRank, address: Address, spec: ReplicaSpec = SPEC, experts: ExpertPlacement | None = None
) -> tuple[RankActor, Channel[RankMessage]]:
    """A rank that serves and has met its peers, and the replica's end of its channel, after the first messages."""
    rank = make_rank()
    await asyncio.to_thread(rank.connect, spec, 1, 7, address[0], SECRET)
    channel = await address[1].get()
    assert await next_news(channel) == Hello(rank=1, life=7, pid=os.getpid(), node_id="")
    assert rank.stats().tp_rank == spec.plan.tp - 1  # before there is a worker
    await asyncio.to_thread(rank.load, experts)
    rank.serve()
    progress = [await next_news(channel)]
    while progress[-1] != Progress(done=1000, total=1000):
        progress.append(await next_news(channel))
    assert len(progress) < 20  # of 1001 reports: a channel is not flooded
    channel.send(StepBatch(step_id=2, chunks=()))  # it has met nobody yet
    channel.send(JOIN)
    joined = await next_news(channel)
    assert isinstance(joined, Joined)
    assert joined.num_tokens == 5
    return rank, channel


async def test_steps_in_order_then_stop(make_rank: MakeRank, address: Address) -> None:
    rank, channel = await start(make_rank, address)
    for number in range(6):
        channel.send(StepBatch(step_id=number, chunks=()))
    assert [await next_news(channel) for _ in range(3)] == [StepResult(step_id=n) for n in (0, 2, 4)]
    channel.send(Stop())
    assert await next_news(channel) == Released()
    assert (rank.stats().num_steps, rank.stats().node) == (6, "first warm")
    assert [(seconds, function is os._exit) for seconds, function in NoTimer.armed] == [(10.0, True)]


@pytest.mark.parametrize(("step", "reason", "is_lost"), [(13, "unlucky", False), (14, "CUDA error", True)])
async def test_step_that_raises_is_reported_once_and_the_rank_lives_on(
    make_rank: MakeRank, address: Address, step: int, reason: str, is_lost: bool
) -> None:
    rank, channel = await start(make_rank, address)
    for number in (2, step, step, 4):
        channel.send(StepBatch(step_id=number, chunks=()))
    assert await next_news(channel) == StepResult(step_id=2)
    assert await next_news(channel) == Failed(reason=f"ValueError: {reason}", is_lost=is_lost)
    assert rank.stats().num_steps == 1
    channel.send(Stop())
    assert await next_news(channel) == Released()


async def test_a_rank_that_waits_for_its_peers_is_called_off_and_meets_them_again(
    make_rank: MakeRank, address: Address
) -> None:
    rank, channel = await start(make_rank, address)
    for number in (2, 15, 4):
        channel.send(StepBatch(step_id=number, chunks=()))
    assert await next_news(channel) == StepResult(step_id=2)
    while not (isinstance(beat := await anext(channel), Beat) and beat.step_seconds):
        pass
    assert beat.is_waiting
    assert beat.num_steps == 1
    channel.send(Pause())
    await asyncio.to_thread(rank.abort)
    assert await next_news(channel) == Failed(reason="ConnectionAbortedError: aborted")
    assert await next_news(channel) == Paused(experts={})
    channel.send(StepBatch(step_id=6, chunks=()))
    channel.send(replace(JOIN, address="nowhere"))
    assert await next_news(channel) == Failed(reason="ConnectionError: nobody came")
    channel.send(StepBatch(step_id=8, chunks=()))
    channel.send(JOIN_AGAIN)
    assert await next_news(channel) == Joined()
    channel.send(StepBatch(step_id=10, chunks=()))
    assert await next_news(channel) == StepResult(step_id=10)
    assert (rank.stats().num_steps, rank.stats().node) == (2, "first warm second")


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
    assert [await next_news(channel) for _ in range(2)] == [StepResult(step_id=2), StepResult(step_id=4)]
    assert rank.stats().expert_tokens == ((1, 5),)
    channel.send(MoveExperts(layer=13, slots=()))
    channel.send(StepBatch(step_id=6, chunks=()))
    assert await next_news(channel) == Failed(reason="ValueError: not there")
    channel.send(Stop())
    assert await next_news(channel) == Released()
    assert rank.stats().num_steps == 2


MOE = replace(
    CONFIG,
    num_hidden_layers=2,
    moe=MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True),
)


async def test_a_new_rank_is_told_where_the_experts_lie_now(make_rank: MakeRank, address: Address) -> None:
    plan = ParallelPlan.of(MOE, ep=2)
    assert plan.experts is not None
    moved = plan.experts.with_layer(1, (plan.experts.slots[1][1], plan.experts.slots[1][0]))
    _, channel = await start(make_rank, address, replace(SPEC, config=MOE, plan=plan), moved)
    channel.send(Pause())
    assert await next_news(channel) == Paused(experts=dict(enumerate(moved.slots)))


async def test_before_it_has_a_worker_a_rank_knows_its_place(make_rank: MakeRank, address: Address) -> None:
    spec = replace(SPEC, config=MOE, plan=ParallelPlan.of(MOE, tp=2, pp=2, ep=2, dp_attention=2))
    rank = make_rank()
    await asyncio.to_thread(rank.connect, spec, 7, 1, address[0], SECRET)
    stats = rank.stats()
    assert (stats.rank, stats.stage, stats.dp_rank, stats.tp_rank) == (7, 1, 1, 1)
    assert (stats.ep_rank, stats.expert_tp_rank, stats.first_layer) == (1, 1, 1)


@pytest.mark.parametrize("is_in_step", [False, True])
async def test_end_of_the_replica_ends_the_rank(make_rank: MakeRank, address: Address, is_in_step: bool) -> None:
    rank, channel = await start(make_rank, address)
    if is_in_step:
        channel.send(StepBatch(step_id=15, chunks=()))
        while not (isinstance(beat := await anext(channel), Beat) and beat.step_seconds):
            pass
    channel.close()
    await asyncio.to_thread(rank._thread.shutdown)
    assert Stub.closed == ["good"]
    assert len(NoTimer.armed) == 1


async def test_what_loading_raises_comes_out_as_it_is(make_rank: MakeRank, address: Address) -> None:
    rank = make_rank()
    await asyncio.to_thread(rank.connect, replace(SPEC, path="bad"), 0, 1, address[0], SECRET)
    with pytest.raises(CheckpointError, match="no such tensor"):
        rank.load(None)


def test_a_rank_on_cpu_claims_little_and_spins_briefly() -> None:
    assert 6 * rank_resources(SPEC)["CPU"] < 0.5
    assert environment(SPEC)["OMP_NUM_THREADS"] == "3"
    assert environment(SPEC)["GOMP_SPINCOUNT"] == "20000"
