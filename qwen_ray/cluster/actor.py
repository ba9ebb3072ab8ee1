"""One rank as a Ray actor: a shell around a worker, and the threads that it lives in.

Knows Ray and the channel to the replica; everything about models is the worker's. All of the worker's work happens in
one thread (a CUDA device and an OpenMP team belong to a thread); `stats` and `abort` answer from another at any time,
and a third says every second that the process runs.

Ray carries the few calls of the start, because it carries exceptions; everything later travels over the channel, which
costs a twentieth. The rank ends when Ray kills it or when the channel ends: a replica that is gone leaves no orphans.
"""

from __future__ import annotations

import logging
import os
import pkgutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import ray

from qwen_ray.cluster.channel import BlockingChannel
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
)
from qwen_ray.cluster.wire import ChannelClosed
from qwen_ray.core.logs import configure_logs
from qwen_ray.core.plan import ExpertPlacement, Rendezvous, ReplicaSpec
from qwen_ray.core.stats import RankStats
from qwen_ray.core.step import MoveExperts, StepBatch, StepResult

logger = logging.getLogger(__name__)

# The worker is named, not imported: who starts a rank imports this module too, and torch would cost every replica
# two seconds and 190 MB that only ranks have use for.
WORKER = "qwen_ray.worker.worker:Worker"

WATCH = "watch"  # the concurrency group of what answers at any time

BEAT_SECONDS = 1.0
PROGRESS_SECONDS = 0.1
EXIT_SECONDS = 10.0  # after the channel has ended, for Ray to end this process in its own way


class Worker(Protocol):
    """What a rank needs of `worker.worker.Worker`."""

    def load(self, on_progress: Callable[[int, int], None]) -> None: ...
    def join(self, rendezvous: Rendezvous) -> None: ...
    def warm_up(self) -> int: ...
    def execute(self, batch: StepBatch) -> StepResult | None: ...
    def move_experts(self, move: MoveExperts) -> None: ...
    def expert_slots(self) -> ExpertSlots: ...
    @property
    def is_waiting(self) -> bool: ...
    def survives(self, error: Exception) -> bool: ...
    def stats(self) -> RankStats: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...


class RankActor:
    """`connect`, `load`, `serve`, in this order, each once; then it does what comes through the channel.

    Before `connect` it is nobody's rank: it only has everything imported.
    """

    _spec: ReplicaSpec
    _rank: int

    def __init__(self, worker: str) -> None:
        self._worker: Worker | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rank")
        self._channel: BlockingChannel[RankMessage] | None = None
        self._sending = threading.Lock()
        self._num_steps = 0
        self._step_started: float | None = None
        self._worker_class: Callable[[ReplicaSpec, int], Worker] = pkgutil.resolve_name(worker)

    def connect(self, spec: ReplicaSpec, rank: int, life: int, address: str, secret: bytes) -> None:
        """Makes it a rank and opens its channel. From now on the replica hears of this process every second."""
        self._spec, self._rank = spec, rank
        if ray.is_initialized():
            configure_logs(spec.logs, f"{spec.name} rank {rank}")
        self._channel = BlockingChannel.connect(address, secret, RANK_CODEC)
        node_id = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        self._send(Hello(rank=self._rank, life=life, pid=os.getpid(), node_id=node_id))
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def load(self, experts: ExpertPlacement | None) -> None:
        """The shard's weights, and room for its keys and values. `experts`: where those of the model lie now."""
        self._in_thread(self._load, experts)

    def serve(self) -> None:
        """Starts to do what comes through the channel; returns at once."""
        self._thread.submit(self._serve)

    @ray.method(concurrency_group=WATCH)
    def stats(self) -> RankStats:
        """Answers while the rank loads or executes."""
        if self._worker is not None:
            return self._worker.stats()
        shard = self._spec.plan.shard(self._spec.config, self._rank)
        return RankStats(
            rank=shard.rank,
            stage=shard.stage,
            tp_rank=shard.tp_rank,
            dp_rank=shard.dp_rank,
            ep_rank=shard.ep_rank,
            expert_tp_rank=shard.expert_tp_rank,
            first_layer=shard.layers.start,
            pid=os.getpid(),
            node=ray.util.get_node_ip_address(),
            device=self._spec.device,
        )

    @ray.method(concurrency_group=WATCH)
    def abort(self) -> None:
        """Ends a step, or a meeting, that waits for other ranks; for good: the rank has to meet them again."""
        if self._worker is not None:
            self._worker.abort()

    @ray.method(concurrency_group=WATCH)
    def free_address(self) -> str:
        """HOST:PORT, a free port of this node, for ranks to meet at."""
        host = ray.util.get_node_ip_address()
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
            free.bind((host, 0))
            return f"[{host}]:{free.getsockname()[1]}" if ":" in host else f"{host}:{free.getsockname()[1]}"

    def _in_thread(self, function: Callable[..., None], *args: Any) -> None:
        self._thread.submit(function, *args).result()

    def _send(self, message: RankMessage) -> None:
        assert self._channel is not None, "connect comes first"
        with self._sending:  # or a heartbeat lands in the middle of a result
            self._channel.send(message)

    def _beat(self) -> None:
        while True:
            worker, started = self._worker, self._step_started
            beat = Beat(num_steps=self._num_steps)
            if worker is not None and started is not None:
                beat = replace(beat, step_seconds=time.monotonic() - started, is_waiting=worker.is_waiting)
            try:
                self._send(beat)
            except ChannelClosed:
                # The replica is gone. A rank that waits for another one would not notice.
                if worker is not None:
                    worker.abort()
                return
            time.sleep(BEAT_SECONDS)

    def _load(self, experts: ExpertPlacement | None) -> None:
        spec = self._spec
        if experts is not None:
            spec = replace(spec, plan=replace(spec.plan, experts=experts))
        last = 0.0

        def report(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done == total or now - last > PROGRESS_SECONDS:
                last = now
                self._send(Progress(done=done, total=total))

        self._worker = self._worker_class(spec, self._rank)
        self._worker.load(report)

    def _serve(self) -> None:
        worker, channel = self._worker, self._channel
        assert worker is not None, "load comes first"
        assert channel is not None, "connect comes first"
        try:
            self._obey(worker, channel)
        except ChannelClosed as error:
            logger.info("rank %d: the replica is gone (%s)", self._rank, error)
        # Ray kills this process when its group stops or its owner dies. If it does not, nobody is left to wait for.
        timer = threading.Timer(EXIT_SECONDS, os._exit, args=(1,))
        timer.daemon = True
        timer.start()
        try:
            worker.close()
            self._send(Released())
        except Exception as error:
            logger.info("rank %d: closing failed: %s", self._rank, error)

    def _obey(self, worker: Worker, channel: BlockingChannel[RankMessage]) -> None:
        """Until Stop. Steps are read and dropped before the rank has met the others, and after one that raised."""
        is_ready = False
        while True:
            message = channel.receive()
            match message:
                case StepBatch() | MoveExperts() | Join():
                    if is_ready or isinstance(message, Join):
                        is_ready = self._try(worker, message)
                case Pause():
                    is_ready = False
                    self._send(Paused(experts=worker.expert_slots()))
                case _:
                    return

    def _try(self, worker: Worker, message: StepBatch | MoveExperts | Join) -> bool:
        """Whether it could be done."""
        self._step_started = time.monotonic()
        try:
            answer = _do(worker, message)
        except Exception as error:
            logger.exception("rank %d failed in %s", self._rank, describe(message))
            answer = Failed(reason=f"{type(error).__name__}: {error}", is_lost=not worker.survives(error))
        self._step_started = None
        self._num_steps += isinstance(message, StepBatch)
        if answer is not None:
            self._send(answer)
        return not isinstance(answer, Failed)


def _do(worker: Worker, message: StepBatch | MoveExperts | Join) -> StepResult | Joined | None:
    if isinstance(message, StepBatch):
        return worker.execute(message)
    if isinstance(message, MoveExperts):
        worker.move_experts(message)
        return None
    worker.join(Rendezvous(address=message.address, name=message.name))
    if not message.warm_up:
        return Joined()
    started = time.monotonic()
    num_tokens = worker.warm_up()
    return Joined(num_tokens=num_tokens, seconds=time.monotonic() - started)


def describe(message: StepBatch | MoveExperts | Join) -> str:
    if isinstance(message, StepBatch):
        return f"step {message.step_id}"
    return "a meeting" if isinstance(message, Join) else f"moving experts of layer {message.layer}"
