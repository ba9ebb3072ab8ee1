"""The `Ingress` deployment: HTTP, text and the journals of requests, in front of all replicas.

Only puts together what the other modules are; Serve calls it, and clients reach it through Serve's proxy.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from qwen_ray.cluster.channel import Channel, Listener, connect, listen
from qwen_ray.cluster.directory import Directory, Entry
from qwen_ray.config import ObservabilitySettings, Settings
from qwen_ray.core.plan import ReplicaSpec
from qwen_ray.grammar.checker import GrammarChecker
from qwen_ray.metrics.recorder import IngressRecorder
from qwen_ray.serving.audit import AuditLog
from qwen_ray.serving.dispatch import Dispatcher
from qwen_ray.serving.fleet import Fleet
from qwen_ray.serving.generation import Generator, Model
from qwen_ray.serving.keys import KeyRing
from qwen_ray.serving.limits import OpenRequests
from qwen_ray.serving.logs import configure_logs
from qwen_ray.serving.messages import CODEC
from qwen_ray.serving.routes import Service, create_app
from qwen_ray.text.tokenizer import Tokenizer

CONNECT_SECONDS = 3.0


async def open_channel(entry: Entry) -> Channel[Any]:
    return await connect(entry.address, entry.secret, CODEC, seconds=CONNECT_SECONDS)


def _audit_log(settings: ObservabilitySettings) -> AuditLog | None:
    """Raises SettingsError when it cannot be written to."""
    if settings.audit_log is None:
        return None
    return AuditLog(settings.audit_log, settings.audit_max_bytes, keeps_contents=settings.audit_contents)


@serve.ingress()
class Ingress:
    async def __init__(
        self, settings: Settings, model: Model, spec: ReplicaSpec, app: str, in_place: bool, replicas: object
    ) -> None:
        """The tokenizer lies at `spec.path` on this node: a directory or a GGUF file. Raises CheckpointError,
        and SettingsError for files of keys and audits.

        `in_place`: there is no room for a replica beside those there are. `replicas` is Serve's handle; it is here so
        that Serve deploys them, requests take another way.
        """
        ingress = serve.get_replica_context().replica_id.unique_id
        configure_logs(settings.observability.log_level, f"ingress {ingress}")
        keys = KeyRing(settings.http)
        audit = _audit_log(settings.observability)
        tokenizer = await asyncio.to_thread(Tokenizer.load, Path(spec.path), settings.models[0].load_format)
        recorder = IngressRecorder(model.name, ingress)
        self._grammars = GrammarChecker(Path(spec.path), settings.models[0].load_format, model.vocab_size)
        self._directory = Directory(app)
        self._dispatcher = Dispatcher(
            lambda: self._directory.list("replica"),
            open_channel,
            recorder.hand_over,
            fingerprint=spec.fingerprint,
            queue_seconds=settings.http.queue_timeout,
            max_waiting=settings.engine.max_num_waiting,
            in_place=in_place,
        )
        recorder.watch(
            lambda: (
                self._dispatcher.num_sequences,
                self._dispatcher.num_waiting,
                Counter(status.state for status in self._dispatcher.statuses),
            )
        )
        fleet = Fleet(ingress, self._dispatcher, recorder, lambda: self._directory.list("ingress"), open_channel)
        self._service = Service(
            generator=Generator(
                model,
                tokenizer,
                self._dispatcher,
                recorder,
                self._grammars,
                log_requests=settings.observability.log_requests,
            ),
            dispatcher=self._dispatcher,
            recorder=recorder,
            metrics=fleet.metrics,
            status=fleet.status,
            expert_load=fleet.expert_load,
            keys=keys,
            open_requests=OpenRequests(settings.http.max_open_requests),
            max_body_bytes=settings.http.max_body_bytes,
            audit=audit,
        )
        self._grammars.start()
        await self._dispatcher.start()
        if await self._directory.list("ingress"):
            # An update, perhaps to another model: the old one serves until this one can.
            await self._dispatcher.until_ready()
        self._listener = await self._announce(ingress, fleet)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._service)

    async def _announce(self, ingress: str, fleet: Fleet) -> Listener[Any]:
        secret = secrets.token_bytes(32)
        listener = await listen(ray.util.get_node_ip_address(), secret, fleet.handle, CODEC)
        context = ray.get_runtime_context()
        await self._directory.announce(
            Entry(
                kind="ingress",
                id=ingress,
                app=self._directory.app,
                address=listener.address,
                secret=secret,
                state="ready",
                actor_id=context.get_actor_id() or "",
                node_id=context.get_node_id(),
            )
        )
        return listener

    async def __del__(self) -> None:
        """Serve awaits this when it stops the ingress."""
        await self._directory.withdraw()
        await self._dispatcher.close()
        await self._listener.close()
        await self._grammars.close()
