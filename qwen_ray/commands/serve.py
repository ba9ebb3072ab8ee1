"""`qwen-ray serve`: checks what can be checked, starts the server process, shows how far it is, and ends it all.

Imports neither torch nor Ray; what serves runs in `serving/launch.py`, in a process of its own.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys

import httpx

from qwen_ray.commands import process_tree
from qwen_ray.commands.child import Event, Stopped, check, ignore_signals, log_file, signals_raise, talk
from qwen_ray.commands.console import ShowProgress, err, out, progress_bars
from qwen_ray.commands.haproxy import check_certificate, in_front
from qwen_ray.commands.ports import port_is_free
from qwen_ray.commands.pull import pull
from qwen_ray.config import API_KEY_VARIABLE, Settings
from qwen_ray.core.errors import QwenRayError, SettingsError
from qwen_ray.machine import this_machine
from qwen_ray.planner.search import plan
from qwen_ray.serving.environment import ALONE, ENVIRONMENT
from qwen_ray.serving.keys import KeyRing
from qwen_ray.sizing import plan_request
from qwen_ray.source.config_file import load_config
from qwen_ray.source.purpose import load_purpose

STOP_SECONDS = 7.0
POLL_SECONDS = 0.25
STEPS = {"ray": "starting Ray Serve", "serve": "starting the model"}


def run_serve(settings: Settings) -> None:
    """Serve until Ctrl-C or SIGTERM, which are a good end at any time. Raises QwenRayError."""
    if settings.ray_address and settings.http.ssl_certfile:
        raise SettingsError(
            "ssl_certfile: the proxies of a running cluster are not ours. Let what stands before them (a gateway, an "
            "ingress) speak TLS.",
            field="http.ssl_certfile",
        )
    if not settings.ray_address:
        http = settings.http
        # What is wrong with a file is said before anything is fetched or started.
        KeyRing(http)
        check_certificate(http)
        if not port_is_free(http.host, http.port):
            raise QwenRayError(
                f"Port {http.port} of {http.host} is in use. Choose another with --port, or stop what uses it."
            )
        for model in settings.models:
            path = pull(model, settings)
            config = load_purpose(path, model.task).applied(load_config(path))
            plan(plan_request(settings, model, config, this_machine(), dp=model.replicas.max)).require()
    with (
        in_front(settings) as (behind, proxy),
        signals_raise(),
        log_file(settings, f"serve-{settings.http.port}") as log,
    ):
        command = [sys.executable, "-m", "qwen_ray.serving.launch"]
        environment = {**ENVIRONMENT, **proxy, **({} if settings.ray_address else ALONE)}
        child = process_tree.start(command, environment, log, without=(API_KEY_VARIABLE,))
        try:
            events = talk(child, behind)
            _wait_until_ready(behind, child, events)
            _show_address(settings)
            _raise_at_end(child, events)
        except Stopped:
            err.print("stopping ...")
        finally:
            ignore_signals()
            process_tree.stop(child, seconds=STOP_SECONDS)


def _wait_until_ready(settings: Settings, child: subprocess.Popen[bytes], events: queue.SimpleQueue[Event]) -> None:
    # One client for all: making one reads the certificates of all authorities.
    with progress_bars() as show, httpx.Client(base_url=address(settings), timeout=2.0) as client:
        show("starting Ray", 0, 1)
        before = "starting Ray"
        while True:
            try:
                event = events.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if before == STEPS["serve"]:
                    _show_loading(client, show)
                continue
            check(child, event)
            show(before, 1, 1)
            if event["event"] == "ready":
                _show_loading(client, show)
                return
            before = STEPS[event["event"]]
            show(before, 0, 1)


def _raise_at_end(child: subprocess.Popen[bytes], events: queue.SimpleQueue[Event]) -> None:
    while True:
        check(child, events.get())


def _show_loading(client: httpx.Client, show: ShowProgress) -> None:
    """One bar for each replica, from what the ingress tells of them; nothing while it is not up."""
    try:
        replicas = client.get("/health/startup").json()["replicas"]
    except (httpx.HTTPError, ValueError, KeyError):
        return
    for index, replica in enumerate(replicas):
        if replica["bytes_total"]:
            show(f"loading weights of replica {index}", replica["bytes_done"], replica["bytes_total"])
        if replica["stage"] in ("warming up", "ready"):
            show(f"warming up replica {index}", int(replica["stage"] == "ready"), 1)


def address(settings: Settings) -> str:
    """Where a client on this machine reaches the server."""
    host = settings.http.host
    scheme = "http" if settings.http.ssl_certfile is None else "https"
    return f"{scheme}://{'127.0.0.1' if host in ('0.0.0.0', '::', '') else host}:{settings.http.port}"


def _show_address(settings: Settings) -> None:
    name = settings.models[0].name
    body = json.dumps(
        {
            "model": name,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
            "stream": True,
        }
    )
    out.print(f"\n{name} is served at {address(settings)}/v1 (Ctrl-C stops it). Try:\n", markup=False)
    has_keys = settings.http.api_keys or settings.http.api_keys_file
    key = f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if has_keys else ""
    out.print(
        f"curl -N {address(settings)}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n  -d '{body}'\n",
        markup=False,
        soft_wrap=True,
    )
