"""The `Replica` deployment: one engine, its group of ranks, and the listener that ingresses connect to.

No request passes through Serve's handles: Serve starts it, judges its health and counts its replicas. It announces
itself before it loads, so that ingresses can tell how far it is. When a rank fails it is replaced (`ranks.py`), and the
engine, which keeps every sequence as `prompt + tokens so far`, goes on; what comes meanwhile waits in its queue.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from typing import Any

import ray
from ray import serve

from qwen_ray.cluster.channel import Listener, listen
from qwen_ray.cluster.directory import Directory, Entry
from qwen_ray.core.errors import RankFailed
from qwen_ray.core.logs import configure_logs
from qwen_ray.core.plan import ReplicaSpec
from qwen_ray.core.request import GenerateRequest
from qwen_ray.core.stats import RankStats, StepStats
from qwen_ray.engine.engine import Engine
from qwen_ray.metrics.exporter import exposition
from qwen_ray.metrics.recorder import ReplicaRecorder
from qwen_ray.serving.autoscaling import autoscaling_stats, pressures
from qwen_ray.serving.expert_balancer import ExpertBalancer
from qwen_ray.serving.messages import CODEC, Answer, Ask, ReplicaState, ReplicaStatus
from qwen_ray.serving.ranks import Ranks
from qwen_ray.serving.sessions import Sessions

logger = logging.getLogger(__name__)

PUSH_SECONDS = 0.25
# A repair takes seconds: requests wait for it, and nobody need be told. One that takes longer counts as trouble; with
# the time that it takes to tell, before 10 s are over.
QUIET_REPAIR_SECONDS = 9.0


class Replica:
    async def __init__(self, spec: ReplicaSpec, app: str, drain_seconds: float) -> None:
        """`drain_seconds`: for ingresses to take over what it runs when it is stopped, at most.

        Returns when it can take requests. Raises what the ranks raise (CheckpointError, PlanRefused, …)."""
        await self.start(serve.get_replica_context().replica_id.unique_id, spec, app, drain_seconds)

    async def start(self, name: str, spec: ReplicaSpec, app: str, drain_seconds: float) -> None:
        """As `name`; also where there is no Serve. Raises what the ranks raise."""
        self._spec = spec
        self._id = name
        configure_logs(spec.logs, f"replica {self._id}")
        self._drain_seconds = drain_seconds
        self._is_draining = False
        self._state: ReplicaState = "loading"
        self._error: str | None = None
        self._started = time.time()
        self._recorder = ReplicaRecorder(spec.name, self._id)
        self._balancer = ExpertBalancer(spec.plan, interval=spec.eplb_interval) if spec.plan.experts else None
        self._ranks = Ranks(spec, self._balancer, self._interrupt)
        self._working: asyncio.Task[None] | None = None  # the engine
        self._repairing: float | None = None  # monotonic, since when
        self._sessions = Sessions(
            self._add, lambda request_id: self._engine.abort(request_id), self.status, self._answer
        )
        self._engine = Engine(spec.engine, self._ranks, self._sessions.publish, self._on_step, self._recorder.finished)
        self._directory = Directory(app)
        self._listener = await self._announce()
        self._pushing = asyncio.create_task(self._push())
        try:
            await self._ranks.start()
        except BaseException:
            await self._close()
            raise
        self._be_ready()
        self._running = asyncio.create_task(self._run())
        if self._balancer is not None:
            self._balancing = asyncio.create_task(self._balancer.run(self._rank_stats, self._ranks.move_experts))

    async def check_health(self) -> None:
        """Raises when there is no hope: Serve then replaces this replica, and ingresses hand over."""
        if self._state == "failed":
            raise RuntimeError(self._error)
        if self._state == "ready" and self._ranks.stalled_seconds > 2 * self._ranks.patience.seconds:
            raise RuntimeError(f"no progress for {self._ranks.stalled_seconds:.0f} s with work to do")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return autoscaling_stats(self._engine.stats(), self._spec.engine)

    def status(self) -> ReplicaStatus:
        return ReplicaStatus(
            replica=self._id,
            model=self._spec.name,
            state="draining" if self._is_draining and self._state != "failed" else self._state,
            tp=self._spec.plan.tp,
            pp=self._spec.plan.pp,
            node=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            started=self._started,
            load_seconds=self._ranks.load_seconds,
            num_restarts=self._ranks.num_restarts,
            num_repairs=self._ranks.num_repairs,
            error=self._error,
            engine=self._engine.stats(),
            stalled_seconds=self._stalled_seconds(),
            stage=self._ranks.stage,
            bytes_done=self._ranks.bytes[0],
            bytes_total=self._ranks.bytes[1],
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
        await self._ranks.stop()

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

    async def _run(self) -> None:
        """The engine, and after a failure ranks that work again, until there is no hope."""
        try:
            while True:
                failure = await self._work()
                logger.error("%s: %s", self._id, failure)
                await self._recover(failure)
        except Exception as error:
            logger.exception("%s gives up", self._id)
            self._error = f"has failed: {error}"
            self._set_state("failed")
            # Channels close, so that ingresses hand over at once; check_health tells Serve.
            self._closing = asyncio.create_task(self._close())

    async def _work(self) -> RankFailed:
        """The engine, until the ranks fail: in a step, or between two, which it would not notice by itself."""
        if (failure := self._ranks.failure) is not None:
            return failure
        working = self._working = asyncio.create_task(self._engine.run())
        try:
            await asyncio.wait((working,))
        finally:
            working.cancel()
        error = None if working.cancelled() else working.exception()
        if error is not None and not isinstance(error, RankFailed):
            raise error
        return error or self._ranks.failure or RankFailed(-1, "the engine has stopped")

    def _interrupt(self) -> None:
        if self._working is not None:
            self._working.cancel()

    async def _recover(self, failure: RankFailed) -> None:
        self._repairing = time.monotonic()
        self._set_state("repairing")
        await self._ranks.recover(failure, lambda: self._set_state("loading"))
        self._be_ready()

    def _be_ready(self) -> None:
        self._repairing = None
        self._set_state("ready")
        logger.info("%s is ready; the ranks started within %.1f s", self._id, self._ranks.load_seconds)

    def _stalled_seconds(self) -> float:
        """How long there has been no progress; 0 while that is nothing to worry about."""
        stalled = self._ranks.stalled_seconds
        if self._repairing is None:
            return stalled if self._state == "ready" and stalled > self._ranks.patience.seconds else 0.0
        stalled = max(stalled, time.monotonic() - self._repairing)
        return stalled if stalled > QUIET_REPAIR_SECONDS else 0.0

    def _set_state(self, state: ReplicaState) -> None:
        self._state = state
        self._sessions.push(self.status())

    def _add(self, request: GenerateRequest) -> None:
        self._engine.add(request)

    def _on_step(self, stats: StepStats) -> None:
        self._ranks.step_done(stats)
        self._recorder.step(stats)

    async def _push(self) -> None:
        """Tells ingresses how it is: soon when something changed, every 2 s otherwise."""
        last: ReplicaStatus | None = None
        age = 0.0
        while True:
            await asyncio.sleep(PUSH_SECONDS)
            self._ranks.look(PUSH_SECONDS, self._engine.stats())
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
            self._recorder.pressures = pressures(self._recorder.engine, self._spec.engine)
            self._recorder.load_seconds = self._ranks.load_seconds
            self._recorder.start = self._ranks.start_times
            self._recorder.num_restarts = self._ranks.num_restarts
            self._recorder.num_repairs = self._ranks.num_repairs
            self._recorder.repair = self._ranks.repair_times
            if self._balancer is not None:
                self._recorder.expert_imbalance = self._balancer.imbalance
                self._recorder.num_rebalances = self._balancer.num_rebalances
            return Answer(ask_id=ask.ask_id, metrics=exposition(self._recorder.registry))
        return Answer(ask_id=ask.ask_id, status=self.status(), ranks=ranks)

    async def _rank_stats(self) -> tuple[RankStats, ...]:
        """Of the ranks that answer; none while they start, or some are replaced."""
        return await self._ranks.stats() if self._state == "ready" else ()
