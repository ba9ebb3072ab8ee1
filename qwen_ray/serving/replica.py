"""The `Replica` deployment: one engine, its group of ranks, and the listener that ingresses connect to.

No request passes through Serve's handles: Serve starts it, judges its health and counts its replicas. It announces
itself before it loads, so that ingresses can tell how far it is. When a rank fails, the group is started anew, and the
engine, which keeps every sequence as `prompt + tokens so far`, goes on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from dataclasses import replace
from typing import Any

import ray
from ray import serve

from qwen_ray.cluster.channel import Listener, listen
from qwen_ray.cluster.directory import Directory, Entry
from qwen_ray.cluster.executor import RayExecutor
from qwen_ray.cluster.group import RankGroup
from qwen_ray.core.errors import RankFailed
from qwen_ray.core.plan import ReplicaSpec
from qwen_ray.core.request import GenerateRequest
from qwen_ray.core.stats import RankStats, StepStats
from qwen_ray.core.step import MoveExperts, StepBatch, StepResult
from qwen_ray.engine.engine import Engine
from qwen_ray.metrics.exporter import exposition
from qwen_ray.metrics.recorder import ReplicaRecorder
from qwen_ray.serving.autoscaling import autoscaling_stats
from qwen_ray.serving.expert_balancer import ExpertBalancer
from qwen_ray.serving.logs import configure_logs
from qwen_ray.serving.messages import CODEC, Answer, Ask, ReplicaState, ReplicaStatus
from qwen_ray.serving.patience import Patience
from qwen_ray.serving.sessions import Sessions

logger = logging.getLogger(__name__)

PUSH_SECONDS = 0.25
PLACEMENT_SECONDS = 600.0  # a cluster that scales with its load may have to start a machine first
MAX_FRUITLESS_STARTS = 3  # of the ranks, without a step in between; then the replica gives up, and Serve replaces it


class CurrentRanks:
    """The engine's executor: whichever group runs now."""

    def __init__(self) -> None:
        self.executor: RayExecutor | None = None

    def submit(self, batch: StepBatch) -> asyncio.Future[StepResult]:
        return self._running().submit(batch)

    def move_experts(self, move: MoveExperts) -> None:
        self._running().move_experts(move)

    def _running(self) -> RayExecutor:
        if self.executor is None:
            raise RankFailed(-1, "no ranks are running")
        return self.executor


class Replica:
    async def __init__(self, spec: ReplicaSpec, app: str, log_level: str, drain_seconds: float) -> None:
        """`drain_seconds`: for ingresses to take over what it runs when it is stopped, at most.

        Returns when it can take requests. Raises what the ranks raise (CheckpointError, PlanRefused, …)."""
        self._spec = spec
        self._id = serve.get_replica_context().replica_id.unique_id
        configure_logs(log_level, f"replica {self._id}")
        self._drain_seconds = drain_seconds
        self._is_draining = False
        self._state: ReplicaState = "loading"
        self._error: str | None = None
        self._stage = "starting"
        self._bytes = (0, 0)
        self._started = time.time()
        self._num_fruitless = 0
        self._patience = Patience()
        self._recorder = ReplicaRecorder(spec.name, self._id)
        self._ranks = CurrentRanks()
        self._group: RankGroup | None = None
        self._balancer = ExpertBalancer(spec.plan, interval=spec.eplb_interval) if spec.plan.experts else None
        self._sessions = Sessions(
            self._add, lambda request_id: self._engine.abort(request_id), self.status, self._answer
        )
        self._engine = Engine(spec.engine, self._ranks, self._sessions.publish, self._on_step, self._recorder.finished)
        self._directory = Directory(app)
        self._listener = await self._announce()
        self._pushing = asyncio.create_task(self._push())
        try:
            await self._start_ranks()
        except BaseException:
            await self._close()
            raise
        self._running = asyncio.create_task(self._run())
        if self._balancer is not None:
            self._balancing = asyncio.create_task(self._balancer.run(self._rank_stats, self._ranks.move_experts))

    async def check_health(self) -> None:
        """Raises when there is no hope: Serve then replaces this replica, and ingresses hand over."""
        if self._state == "failed":
            raise RuntimeError(self._error)
        if self._state == "ready" and self._engine.stalled_seconds > 2 * self._patience.seconds:
            raise RuntimeError(f"no progress for {self._engine.stalled_seconds:.0f} s with work to do")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return autoscaling_stats(self._engine.stats(), self._spec.engine)

    def status(self) -> ReplicaStatus:
        stalled = self._engine.stalled_seconds if self._state == "ready" else 0.0
        return ReplicaStatus(
            replica=self._id,
            model=self._spec.name,
            state="draining" if self._is_draining and self._state != "failed" else self._state,
            tp=self._spec.plan.tp,
            pp=self._spec.plan.pp,
            node=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            started=self._started,
            load_seconds=self._recorder.load_seconds,
            num_restarts=self._recorder.num_restarts,
            error=self._error,
            engine=self._engine.stats(),
            stalled_seconds=stalled if stalled > self._patience.seconds else 0.0,
            stage=self._stage,
            bytes_done=self._bytes[0],
            bytes_total=self._bytes[1],
            dp_attention=self._spec.plan.dp_attention,
            ep=self._spec.plan.ep,
            expert_imbalance=self._balancer.imbalance if self._balancer else None,
            num_rebalances=self._balancer.num_rebalances if self._balancer else 0,
            fingerprint=self._spec.fingerprint,
        )

    async def __del__(self) -> None:
        """Serve awaits this when it stops the replica: ingresses let go of it, and the ranks are gone within 5 s."""
        self._is_draining = True
        self._sessions.push(self.status())
        if getattr(self, "_running", None) is not None:  # it was ready once: there may be something to hand over
            await self._sessions.until_released(self._drain_seconds)
        await self._close()

    async def _close(self) -> None:
        for name in ("_running", "_pushing", "_balancing"):
            task = getattr(self, name, None)
            if task is not None:
                task.cancel()
        await self._directory.withdraw()
        await self._listener.close()
        group, self._group = self._group, None
        if group is not None:
            await group.stop()

    async def _announce(self) -> Listener[Any]:
        secret = secrets.token_bytes(32)
        listener = await listen(ray.util.get_node_ip_address(), secret, self._sessions.handle, CODEC)
        context = ray.get_runtime_context()
        await self._directory.announce(
            Entry(
                kind="replica",
                id=self._id,
                app=self._directory.app,
                address=listener.address,
                secret=secret,
                state="starting",
                actor_id=context.get_actor_id() or "",
                node_id=context.get_node_id(),
            )
        )
        return listener

    async def _start_once(self) -> None:
        started = time.monotonic()
        self._set_state("loading")
        self._stage, self._bytes = "starting", (0, 0)
        spec = self._spec
        if self._balancer is not None:
            spec = replace(spec, plan=replace(spec.plan, experts=self._balancer.placement))
        self._group = await RankGroup.start(spec, on_progress=self._on_progress, placement_seconds=PLACEMENT_SECONDS)
        self._ranks.executor = RayExecutor(self._group)
        self._recorder.load_seconds = time.monotonic() - started
        self._stage = "ready"
        self._set_state("ready")
        logger.info("%s is ready after %.1f s", self._id, self._recorder.load_seconds)

    async def _start_ranks(self) -> None:
        """Raises RankFailed when they have failed too often without a step in between; other errors at once."""
        while True:
            try:
                await self._start_once()
                return
            except RankFailed as failure:
                self._num_fruitless += 1
                if self._num_fruitless >= MAX_FRUITLESS_STARTS:
                    raise
                logger.error("%s: %s; once more", self._id, failure)

    async def _run(self) -> None:
        """The engine, and after a failure new ranks for it, until there is no hope."""
        try:
            while True:
                try:
                    await self._engine.run()
                    return
                except RankFailed as failure:
                    logger.error("%s: %s; starting the ranks anew", self._id, failure)
                    self._num_fruitless += 1
                    if self._num_fruitless >= MAX_FRUITLESS_STARTS:
                        raise
                await self._stop_ranks()
                self._recorder.num_restarts += 1
                await self._start_ranks()
        except Exception as error:
            logger.exception("%s gives up", self._id)
            self._error = f"has failed: {error}"
            self._set_state("failed")
            # Channels close, so that ingresses hand over at once; check_health tells Serve.
            self._closing = asyncio.create_task(self._close())

    async def _stop_ranks(self) -> None:
        self._set_state("loading")
        self._ranks.executor = None
        group, self._group = self._group, None
        if group is not None:
            await group.stop()

    def _set_state(self, state: ReplicaState) -> None:
        self._state = state
        self._sessions.push(self.status())

    def _add(self, request: GenerateRequest) -> None:
        self._engine.add(request)

    def _on_progress(self, done: int, total: int) -> None:
        self._bytes = (done, total)
        self._stage = "reading weights" if done < total else "warming up"

    def _on_step(self, stats: StepStats) -> None:
        self._num_fruitless = 0
        self._patience.learn(stats.step_seconds)
        self._recorder.step(stats)

    async def _push(self) -> None:
        """Tells ingresses how it is: soon when something changed, every 2 s otherwise."""
        last: ReplicaStatus | None = None
        age = 0.0
        while True:
            await asyncio.sleep(PUSH_SECONDS)
            status = self.status()
            age += PUSH_SECONDS
            if status != last or age >= 2.0:
                self._sessions.push(status)
                last, age = status, 0.0

    async def _answer(self, ask: Ask) -> Answer:
        ranks = await self._rank_stats()
        if ask.what == "metrics":
            self._recorder.engine = self._engine.stats()
            self._recorder.ranks = ranks
            if self._balancer is not None:
                self._recorder.expert_imbalance = self._balancer.imbalance
                self._recorder.num_rebalances = self._balancer.num_rebalances
            return Answer(ask_id=ask.ask_id, metrics=exposition(self._recorder.registry))
        return Answer(ask_id=ask.ask_id, status=self.status(), ranks=ranks)

    async def _rank_stats(self) -> tuple[RankStats, ...]:
        """Of the ranks that answer, by rank; none while they start."""
        group = self._group
        return tuple(await group.stats()) if group is not None and self._state == "ready" else ()
