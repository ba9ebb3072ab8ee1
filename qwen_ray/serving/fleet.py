"""All processes of an application, asked for their metrics and their state by one ingress.

Knows how to ask and how long to wait; whoever does not answer in time is left out, so that one stuck replica never
hides the others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from typing import Any

from qwen_ray.cluster.channel import Channel
from qwen_ray.cluster.directory import Entry
from qwen_ray.cluster.wire import ChannelClosed
from qwen_ray.core.errors import InvalidRequest, NotReady
from qwen_ray.core.stats import ExpertLoad, ScalingStats
from qwen_ray.metrics.exporter import exposition, merge
from qwen_ray.metrics.recorder import IngressRecorder
from qwen_ray.serving.dispatch import Dispatcher
from qwen_ray.serving.link import Link
from qwen_ray.serving.messages import Answer, Ask

logger = logging.getLogger(__name__)

ASK_SECONDS = 2.0


async def _unknown() -> ScalingStats | None:
    return None


class Fleet:
    """`last_decided`: what autoscaling has, None where nobody scales."""

    def __init__(
        self,
        ingress: str,
        dispatcher: Dispatcher,
        recorder: IngressRecorder,
        find_ingresses: Callable[[], Awaitable[list[Entry]]],
        connect: Callable[[Entry], Awaitable[Channel[Any]]],
        last_decided: Callable[[], Awaitable[ScalingStats | None]] = _unknown,
    ) -> None:
        self._ingress = ingress
        self._dispatcher = dispatcher
        self._recorder = recorder
        self._find_ingresses = find_ingresses
        self._connect = connect
        self._last_decided = last_decided

    async def metrics(self) -> str:
        """One exposition of every ingress, replica and rank."""
        entries = await self._ingresses()
        texts = await asyncio.gather(
            self._own_metrics(),
            *(_or_nothing(self._replica_metrics(link)) for link in self._dispatcher.links),
            *(_or_nothing(self._ingress_metrics(entry)) for entry in entries if entry.id != self._ingress),
        )
        return merge(texts)

    async def metrics_of(self, ingress: str | None, replica: str | None) -> str:
        """One process's part of it. Raises InvalidRequest for a process that is not there, NotReady for one that does
        not answer, so that whoever watches it can tell."""
        if (ingress is None) == (replica is None):
            raise InvalidRequest("Either `ingress` or `replica`, or none of them for all.", param="ingress")
        try:
            if ingress == self._ingress:
                return merge([await self._own_metrics()])
            for entry in await self._ingresses():
                if entry.id == ingress:
                    return merge([await self._ingress_metrics(entry)])
            for link in self._dispatcher.links:
                if link.replica == replica:
                    return merge([await self._replica_metrics(link)])
        except ChannelClosed as error:
            raise NotReady(str(error)) from error
        param = "replica" if ingress is None else "ingress"
        raise InvalidRequest(f"There is no {param} `{ingress or replica}` now.", param=param, code="unknown_process")

    async def processes(self) -> list[tuple[str, str]]:
        """Those that `metrics_of` knows: kind and id."""
        ingresses = {self._ingress, *(entry.id for entry in await self._ingresses())}
        replicas = {link.replica for link in self._dispatcher.links}
        return [*(("ingress", name) for name in sorted(ingresses)), *(("replica", name) for name in sorted(replicas))]

    async def status(self) -> dict[str, Any]:
        """Ingresses, replicas and their ranks as plain JSON."""
        replicas = await asyncio.gather(*(self._replica_status(link) for link in self._dispatcher.links))
        ingresses = [{"id": entry.id, "address": entry.address} for entry in await self._ingresses()]
        return {"ingresses": ingresses, "replicas": sorted(replicas, key=lambda replica: replica["replica"])}

    async def expert_load(self) -> tuple[tuple[int, ...], ...]:
        """Tokens that each expert has computed, by layer, on all replicas that answer; () for a dense model."""
        answers = await asyncio.gather(*(self._ask_status(link) for link in self._dispatcher.links))
        loads = [ExpertLoad.of(answer.ranks).by_expert for answer in answers if answer is not None]
        num_layers = max(map(len, loads), default=0)  # fewer where a stage did not answer
        whole = [load for load in loads if len(load) == num_layers]
        return tuple(tuple(map(sum, zip(*layer, strict=True))) for layer in zip(*whole, strict=True))

    async def handle(self, channel: Channel[Any]) -> None:
        """Another ingress, which asks for this one's own metrics. A Listener's handler."""
        async for message in channel:
            if isinstance(message, Ask):
                channel.send(Answer(ask_id=message.ask_id, metrics=await self._own_metrics()))

    async def _own_metrics(self) -> str:
        try:
            async with asyncio.timeout(ASK_SECONDS / 2):
                self._recorder.scaling = await self._last_decided()
        except Exception as error:  # the GCS is away: Ray's own errors, of several kinds
            logger.warning("autoscaling not readable: %s", error)
        return exposition(self._recorder.registry)

    async def _ingresses(self) -> list[Entry]:
        try:
            async with asyncio.timeout(ASK_SECONDS):
                return await self._find_ingresses()
        except Exception as error:  # the GCS is away: Ray's own errors, of several kinds
            logger.warning("directory not readable: %s", error)
            return []

    async def _replica_metrics(self, link: Link) -> str:
        """Raises ChannelClosed."""
        return (await link.ask("metrics", seconds=ASK_SECONDS)).metrics

    async def _replica_status(self, link: Link) -> dict[str, Any]:
        """What it says now, or what it said last."""
        answer = await self._ask_status(link)
        status = answer.status if answer else link.status
        # What each expert has computed is much, and asked for elsewhere.
        ranks = [
            {**asdict(replace(rank, expert_tokens=())), "expert_tokens": sum(map(sum, rank.expert_tokens))}
            for rank in (answer.ranks if answer else ())
        ]
        if status is None:
            return {"replica": link.replica, "state": "unknown", "engine": None, "ranks": ranks}
        engine = {**asdict(status.engine), "kv_usage": status.engine.kv_usage} if status.engine else None
        return {**asdict(status), "engine": engine, "ranks": ranks}

    async def _ask_status(self, link: Link) -> Answer | None:
        try:
            return await link.ask("status", seconds=ASK_SECONDS)
        except ChannelClosed as error:
            logger.warning("no status from %s: %s", link.replica, error)
            return None

    async def _ingress_metrics(self, entry: Entry) -> str:
        """Raises ChannelClosed."""
        try:
            async with asyncio.timeout(ASK_SECONDS):
                channel = await self._connect(entry)
                try:
                    channel.send(Ask(ask_id=0, what="metrics"))
                    answer = await anext(channel, None)
                finally:
                    channel.close()
        except TimeoutError as error:
            raise ChannelClosed(f"ingress {entry.id} did not answer within {ASK_SECONDS} s") from error
        if not isinstance(answer, Answer):
            raise ChannelClosed(f"ingress {entry.id} has hung up")
        return answer.metrics


async def _or_nothing(metrics: Awaitable[str]) -> str:
    try:
        return await metrics
    except ChannelClosed as error:
        logger.warning("metrics of a process are left out: %s", error)
        return ""
