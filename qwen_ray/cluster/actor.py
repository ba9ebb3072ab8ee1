"""One rank as a Ray actor: a shell around a worker, and the thread that it lives in.

Knows Ray and the channel to the replica; everything about models is the worker's. All of the worker's work happens in
one thread (a CUDA device and an OpenMP team belong to a thread); `stats` answers from another at any time.

Ray carries the few calls of the start, because it carries exceptions; steps travel over the channel, which costs a
twentieth. The rank ends when Ray kills it or when the channel ends: a replica that is gone leaves no orphans.
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
from typing import Any, Protocol

import ray

from qwen_ray.cluster.channel import BlockingChannel
from qwen_ray.cluster.rank_messages import RANK_CODEC, Failed, Hello, Progress, RankMessage, Released
from qwen_ray.cluster.wire import ChannelClosed
from qwen_ray.core.plan import Rendezvous, ReplicaSpec
from qwen_ray.core.stats import RankStats
from qwen_ray.core.step import MoveExperts, StepBatch, StepResult

logger = logging.getLogger(__name__)

# The worker is named, not imported: who starts a rank imports this module too, and torch would cost every replica
# two seconds and 190 MB that only ranks have use for.
WORKER = "qwen_ray.worker.worker:Worker"

WATCH = "watch"  # the concurrency group of what answers at any time

PROGRESS_SECONDS = 0.1
EXIT_SECONDS = 10.0  # after the channel has ended, for Ray to end this process in its own way


class Worker(Protocol):
    """What a rank needs of `worker.worker.Worker`."""

    def join(self) -> None: ...
    def load(self, on_progress: Callable[[int, int], None]) -> None: ...
    def allocate(self) -> None: ...
    def execute(self, batch: StepBatch) -> StepResult | None: ...
    def move_experts(self, move: MoveExperts) -> None: ...
    def stats(self) -> RankStats: ...
    def close(self) -> None: ...


class RankActor:
    """`connect`, `join`, `load`, `allocate`, `serve`, in this order, each once on every rank."""

    def __init__(self, spec: ReplicaSpec, rank: int, worker: str) -> None:
        self._spec = spec
        self._rank = rank
        self._worker: Worker | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"rank-{rank}")
        self._channel: BlockingChannel[RankMessage] | None = None
        self._worker_class: Callable[[ReplicaSpec, int, Rendezvous], Worker] = pkgutil.resolve_name(worker)

    def __repr__(self) -> str:
        return f"rank-{self._rank}"

    def connect(self, address: str, secret: bytes) -> str:
        """Opens the channel. Gives HOST:PORT, a free port of this node, for ranks to meet at."""
        self._channel = BlockingChannel.connect(address, secret, RANK_CODEC)
        self._channel.send(Hello(rank=self._rank))
        host = ray.util.get_node_ip_address()
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
            free.bind((host, 0))
            return f"[{host}]:{free.getsockname()[1]}" if ":" in host else f"{host}:{free.getsockname()[1]}"

    def join(self, rendezvous: Rendezvous) -> None:
        self._in_thread(self._create_and_join, rendezvous)

    def load(self) -> None:
        self._in_thread(self._load)

    def allocate(self) -> None:
        self._in_thread(self._need_worker().allocate)

    def serve(self) -> None:
        """Starts to execute what comes through the channel; returns at once."""
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

    def _in_thread(self, function: Callable[..., None], *args: Any) -> None:
        self._thread.submit(function, *args).result()

    def _need_worker(self) -> Worker:
        assert self._worker is not None, "join comes first"
        return self._worker

    def _need_channel(self) -> BlockingChannel[RankMessage]:
        assert self._channel is not None, "connect comes first"
        return self._channel

    def _create_and_join(self, rendezvous: Rendezvous) -> None:
        self._worker = self._worker_class(self._spec, self._rank, rendezvous)
        self._worker.join()

    def _load(self) -> None:
        channel = self._need_channel()
        last = 0.0

        def report(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done == total or now - last > PROGRESS_SECONDS:
                last = now
                channel.send(Progress(done=done, total=total))

        self._need_worker().load(report)

    def _serve(self) -> None:
        worker, channel = self._need_worker(), self._need_channel()
        try:
            self._execute_all(worker, channel)
        except ChannelClosed as error:
            logger.info("rank %d: the replica is gone (%s)", self._rank, error)
        # Ray kills this process when its group stops or its owner dies. If it does not, nobody is left to wait for.
        timer = threading.Timer(EXIT_SECONDS, os._exit, args=(1,))
        timer.daemon = True
        timer.start()
        try:
            worker.close()
            channel.send(Released())
        except Exception as error:
            logger.info("rank %d: closing failed: %s", self._rank, error)

    def _execute_all(self, worker: Worker, channel: BlockingChannel[RankMessage]) -> None:
        """Until Stop. After one that raised, later messages are read and dropped: the rank stays for inspection."""
        has_failed = False
        while isinstance(message := channel.receive(), StepBatch | MoveExperts):
            if has_failed:
                continue
            try:
                result = worker.execute(message) if isinstance(message, StepBatch) else worker.move_experts(message)
            except Exception as error:
                logger.exception("rank %d failed in %s", self._rank, describe(message))
                has_failed = True
                channel.send(Failed(reason=f"{type(error).__name__}: {error}"))
                continue
            if result is not None:
                channel.send(result)


def describe(message: StepBatch | MoveExperts) -> str:
    if isinstance(message, StepBatch):
        return f"step {message.step_id}"
    return f"moving experts of layer {message.layer}"
