"""What helm installs into where there is no cluster: an emulated API server, and PostgreSQL for helm's own records.

kmock keeps objects and forgets what it does not know; nothing is admitted, scheduled or run. It writes the core group's
version as `/v1` in discovery, which helm cannot read, and says that it is an old Kubernetes: both are put right on the
way. Not a test.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import kmock
import yaml
from aiohttp import web

# Kind -> (group/version, plural): those that the chart can render.
KINDS = {
    "ConfigMap": "v1/configmaps",
    "Namespace": "v1/namespaces",
    "PersistentVolumeClaim": "v1/persistentvolumeclaims",
    "Pod": "v1/pods",
    "Secret": "v1/secrets",
    "Service": "v1/services",
    "Ingress": "networking.k8s.io/v1/ingresses",
    "NetworkPolicy": "networking.k8s.io/v1/networkpolicies",
    "PodDisruptionBudget": "policy/v1/poddisruptionbudgets",
    "RayService": "ray.io/v1/rayservices",
    "PodMonitor": "monitoring.coreos.com/v1/podmonitors",
    "PrometheusRule": "monitoring.coreos.com/v1/prometheusrules",
    "ServiceMonitor": "monitoring.coreos.com/v1/servicemonitors",
    "HTTPRoute": "gateway.networking.k8s.io/v1/httproutes",
    "InferencePool": "inference.networking.k8s.io/v1/inferencepools",
}
VERSION = "v1.34.0"
VERBS = ("get", "list", "watch", "create", "update", "patch", "delete")


@dataclass
class Server:
    """A thread with kmock behind a door that puts discovery right."""

    url: str = ""
    objects: Any = None
    _behind: str = ""
    _ready: threading.Event = field(default_factory=threading.Event)
    _ending: Any = None
    _loop: Any = None

    def names(self, kind: str) -> list[str]:
        plural = KINDS[kind].rpartition("/")[2]
        return sorted(
            name
            for (resource, _, name), found in self.objects.items()
            if resource.plural == plural and not found.deleted
        )

    def get(self, kind: str, name: str) -> dict[str, Any]:
        plural = KINDS[kind].rpartition("/")[2]
        (found,) = [v for (resource, _, n), v in self.objects.items() if (resource.plural, n) == (plural, name)]
        return json.loads(json.dumps(found.last if hasattr(found, "last") else found, default=dict))

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        emulator = kmock.KubernetesEmulator(strict=False)  # an object that is not there is no failure
        for kind, path in KINDS.items():
            info = kmock.ResourceInfo(
                kind=kind,
                singular=kind.lower(),
                namespaced=kind != "Namespace",
                verbs=set(VERBS),
                shortnames=set(),
                categories=set(),
                subresources=set(),
            )
            emulator.resources[path] = info
        self.objects = emulator.objects
        async with emulator, kmock.Server(emulator, port=0) as behind:
            door = web.Application(client_max_size=2**26)
            self._behind = str(behind.url).rstrip("/")
            door.router.add_route("*", "/{path:.*}", self._pass_on)
            runner = web.AppRunner(door)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            self._ready.set()
            await self._ending.wait()
            await runner.cleanup()

    async def _pass_on(self, request: web.Request) -> web.Response:
        async with aiohttp.ClientSession() as session:
            headers = {k: v for k, v in request.headers.items() if k.lower() in ("content-type", "accept")}
            url = self._behind + request.path_qs
            async with session.request(request.method, url, data=await request.read(), headers=headers) as answer:
                text = (await answer.text()).replace('"groupVersion": "/v1"', '"groupVersion": "v1"')
                if request.path == "/version":
                    text = json.dumps({**json.loads(text), "gitVersion": VERSION})
                return web.Response(status=answer.status, text=text, content_type="application/json")


@contextmanager
def api_server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert server._ready.wait(30)
    try:
        yield server
    finally:
        server._loop.call_soon_threadsafe(server._ending.set)
        thread.join()


def kubeconfig(url: str, file: Path) -> Path:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "emulated",
        "clusters": [{"name": "emulated", "cluster": {"server": url}}],
        "contexts": [{"name": "emulated", "context": {"cluster": "emulated", "user": "nobody"}}],
        "users": [{"name": "nobody", "user": {}}],
    }
    file.write_text(yaml.safe_dump(content))
    return file


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """A database of its own, reached through a socket in `folder`, as its address. Ended afterwards."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        raise RuntimeError("helm's records need PostgreSQL here: apt-get install postgresql")
    data = folder / "data"
    as_user = _as_somebody(folder)
    run = [*as_user, str(programs[-1] / "pg_ctl"), "-D", str(data), "-s", "-w"]
    options = f"-k {folder} -c listen_addresses= -c fsync=off"
    subprocess.run(
        [*as_user, str(programs[-1] / "initdb"), "-D", str(data), "-U", "helm", "-A", "trust", "-N"],
        check=True,
        capture_output=True,
    )
    subprocess.run([*run, "-l", str(folder / "log"), "-o", options, "start"], check=True)
    try:
        yield f"postgresql:///postgres?host={folder}&user=helm&sslmode=disable"
    finally:
        subprocess.run([*run, "-m", "immediate", "stop"], check=True)


def _as_somebody(folder: Path) -> list[str]:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return []
    shutil.chown(folder, "nobody")
    return ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
