"""What answers requests in front of replicas: text, journals, grammars and the routes' `Service`.

Knows which parts there are and how they stand together; not who calls: an ingress behind Serve's proxy, or a batch.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

from qwen_ray.cluster.channel import Channel, connect
from qwen_ray.cluster.directory import Directory, Entry
from qwen_ray.config import ObservabilitySettings, Settings
from qwen_ray.core.plan import ReplicaSpec
from qwen_ray.grammar.checker import GrammarChecker
from qwen_ray.metrics.recorder import IngressRecorder
from qwen_ray.serving.audit import AuditLog
from qwen_ray.serving.autoscaling import last_decided
from qwen_ray.serving.dispatch import Dispatcher
from qwen_ray.serving.fleet import Fleet
from qwen_ray.serving.generation import Generator, Model
from qwen_ray.serving.keys import KeyRing
from qwen_ray.serving.limits import OpenRequests
from qwen_ray.serving.messages import CODEC
from qwen_ray.serving.routes import Service
from qwen_ray.text.tokenizer import Tokenizer
from qwen_ray.tracing import Tracer

CONNECT_SECONDS = 3.0


class Frontend:
    """Make it with `make`, then `start`, then `close`. `replicas` are those that `directory` knows."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        model: Model,
        spec: ReplicaSpec,
        tokenizer: Tokenizer,
        directory: Directory,
        *,
        in_place: bool,
    ) -> None:
        keys = KeyRing(settings.http)
        recorder = IngressRecorder(model.name, name, settings.observability.price_per_hour)
        self._grammars = GrammarChecker(Path(spec.path), settings.models[0].load_format, model.vocab_size)
        self.dispatcher = Dispatcher(
            lambda: directory.list("replica"),
            open_channel,
            recorder.hand_over,
            fingerprint=spec.fingerprint,
            queue_seconds=settings.http.queue_timeout,
            max_waiting=settings.engine.max_num_waiting,
            in_place=in_place,
        )
        recorder.watch(
            lambda: (
                self.dispatcher.num_sequences,
                self.dispatcher.num_waiting,
                Counter(status.state for status in self.dispatcher.statuses),
            )
        )
        self.fleet = Fleet(
            name,
            self.dispatcher,
            recorder,
            lambda: directory.list("ingress"),
            open_channel,
            lambda: last_decided(directory.app),
        )
        self.service = Service(
            generator=Generator(
                model,
                tokenizer,
                self.dispatcher,
                recorder,
                self._grammars,
                log_requests=settings.observability.log_requests,
            ),
            dispatcher=self.dispatcher,
            recorder=recorder,
            fleet=self.fleet,
            keys=keys,
            open_requests=OpenRequests(settings.http.max_open_requests),
            max_body_bytes=settings.http.max_body_bytes,
            audit=_audit_log(settings.observability),
            tracer=_tracer(settings.observability, name),
        )

    @classmethod
    async def make(
        cls,
        name: str,
        settings: Settings,
        model: Model,
        spec: ReplicaSpec,
        directory: Directory,
        *,
        in_place: bool = False,
    ) -> Frontend:
        """The tokenizer lies at `spec.path` on this node: a directory or a GGUF file. `in_place`: there is no room for
        a replica beside those there are. Raises CheckpointError, and SettingsError for files of keys and audits."""
        tokenizer = await asyncio.to_thread(Tokenizer.load, Path(spec.path), settings.models[0].load_format)
        return cls(name, settings, model, spec, tokenizer, directory, in_place=in_place)

    async def start(self) -> None:
        self._grammars.start()
        await self.dispatcher.start()

    async def close(self) -> None:
        await self.dispatcher.close()
        await self._grammars.close()
        if self.service.tracer is not None:
            await asyncio.to_thread(self.service.tracer.close)


async def open_channel(entry: Entry) -> Channel[Any]:
    return await connect(entry.address, entry.secret, CODEC, seconds=CONNECT_SECONDS)


def _audit_log(settings: ObservabilitySettings) -> AuditLog | None:
    """Raises SettingsError when it cannot be written to."""
    if settings.audit_log is None:
        return None
    return AuditLog(settings.audit_log, settings.audit_max_bytes, keeps_contents=settings.audit_contents)


def _tracer(settings: ObservabilitySettings, name: str) -> Tracer | None:
    endpoint = settings.otlp_endpoint
    return None if endpoint is None else Tracer(endpoint, settings.trace_sample_rate, name)
