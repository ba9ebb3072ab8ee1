"""The `Ingress` deployment: HTTP, text and the journals of requests, in front of all replicas.

Only puts together what the other modules are; Serve calls it, and clients reach it through Serve's proxy.
"""

from __future__ import annotations

import secrets
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from qwen_ray.cluster.channel import Listener, listen
from qwen_ray.cluster.directory import Directory, Entry
from qwen_ray.config import Settings
from qwen_ray.core.logs import configure_logs
from qwen_ray.core.plan import ReplicaSpec
from qwen_ray.serving.fleet import Fleet
from qwen_ray.serving.frontend import Frontend
from qwen_ray.serving.generation import Model
from qwen_ray.serving.messages import CODEC
from qwen_ray.serving.routes import create_app


@serve.ingress()
class Ingress:
    async def __init__(
        self, settings: Settings, model: Model, spec: ReplicaSpec, app: str, in_place: bool, replicas: object
    ) -> None:
        """`in_place`: there is no room for a replica beside those there are. `replicas` is Serve's handle; it is here
        so that Serve deploys them, requests take another way. Raises CheckpointError and SettingsError."""
        ingress = serve.get_replica_context().replica_id.unique_id
        configure_logs(settings.observability.logs, f"ingress {ingress}")
        self._directory = Directory(app)
        self._frontend = await Frontend.make(ingress, settings, model, spec, self._directory, in_place=in_place)
        await self._frontend.start()
        if await self._directory.list("ingress"):
            # An update, perhaps to another model: the old one serves until this one can.
            await self._frontend.dispatcher.until_ready()
        self._listener = await self._announce(ingress, self._frontend.fleet)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._frontend.service, behind_serve=True)

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
        await self._frontend.close()
        await self._listener.close()
