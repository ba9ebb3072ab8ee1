"""`qwen-ray status`: what a running server says of itself, as tables or JSON."""

from __future__ import annotations

import json
from typing import Any

import httpx
from rich.table import Table

from qwen_ray.commands.console import out
from qwen_ray.core.errors import QwenRayError

_MB = 1e6


def run_status(url: str, *, as_json: bool) -> None:
    """Raises QwenRayError when nothing answers at `url`."""
    status = fetch(url)
    if as_json:
        out.print(json.dumps(status, indent=2), markup=False, soft_wrap=True)
        return
    model = status["model"]
    out.print(
        f"qwen-ray {status['version']} at {url}: {model['id']} ({model['root']}), context of "
        f"{model['max_model_len']} tokens, {len(status['ingresses'])} ingress, {len(status['replicas'])} replica",
        markup=False,
    )
    for replica in status["replicas"]:
        _show_replica(replica)


def fetch(url: str) -> dict[str, Any]:
    try:
        answer = httpx.get(f"{url}/status", timeout=10.0)
        answer.raise_for_status()
        return answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise QwenRayError(
            f"No qwen-ray server answers at {url} ({error}). Start one with `qwen-ray serve`."
        ) from error


def _show_replica(replica: dict[str, Any]) -> None:
    engine = replica["engine"]
    out.print()
    head = f"replica {replica['replica']}: {replica['state']}"
    if replica.get("error"):
        head += f", {replica['error']}"
    if engine:
        head += (
            f", {engine['num_running']} running, {engine['num_waiting']} waiting, KV cache {engine['kv_usage']:.0%} of "
            f"{engine['num_blocks'] * engine['block_size']} tokens, {engine['steps_total']} steps"
        )
    out.print(head, markup=False)
    if not replica["ranks"]:
        return
    table = Table()
    for name in ("rank", "stage", "tp rank", "pid", "node", "device", "memory", "weights", "KV cache", "steps"):
        table.add_column(name, justify="left" if name in ("node", "device") else "right")
    for rank in replica["ranks"]:
        table.add_row(
            *(str(rank[name]) for name in ("rank", "stage", "tp_rank", "pid", "node", "device")),
            *(f"{rank[name] / _MB:.0f} MB" for name in ("memory_bytes", "weights_bytes", "kv_bytes")),
            str(rank["num_steps"]),
        )
    out.print(table)
