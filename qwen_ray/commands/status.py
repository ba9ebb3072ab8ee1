"""`qwen-ray status`: what a running server says of itself, as tables or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
from rich.table import Table

from qwen_ray.commands.console import out
from qwen_ray.commands.load import WITH_KEY, bearer
from qwen_ray.core.errors import QwenRayError

_MB = 1e6


def run_status(url: str, *, as_json: bool, expert_load: Path | None = None, api_key: str | None = None) -> None:
    """`expert_load`: a file to write what experts have computed to. Raises QwenRayError when nothing answers."""
    if expert_load is not None:
        _write_expert_load(url, expert_load, api_key)
        return
    status = fetch(url, "status", api_key)
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


def _write_expert_load(url: str, file: Path, api_key: str | None) -> None:
    load = fetch(url, "expert_load", api_key)
    if not any(load["expert_tokens"]):
        raise QwenRayError(f"{load['model']} has no experts, or its ranks do not answer now.")
    try:
        file.write_text(json.dumps(load), encoding="utf-8")
    except OSError as error:
        raise QwenRayError(f"{file}: cannot be written: {error.strerror}.") from error
    out.print(f"{file}: what the experts of {load['model']} have computed", markup=False)


def fetch(url: str, path: str, api_key: str | None) -> dict[str, Any]:
    try:
        answer = httpx.get(f"{url}/{path}", headers=bearer(api_key), timeout=10.0)
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise QwenRayError(f"{url} wants another API key: {WITH_KEY}.")
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
    if replica.get("expert_imbalance") is not None:
        out.print(
            f"experts: the fullest rank computes {replica['expert_imbalance']:.2f} times the mean; "
            f"moved {replica['num_rebalances']} times",
            markup=False,
        )
    if replica["ranks"]:
        out.print(_rank_table(replica["ranks"]))


def _rank_table(ranks: list[dict[str, Any]]) -> Table:
    """Of the degrees, those that the plan has."""
    degrees = [name for name in ("stage", "dp_rank", "tp_rank", "ep_rank") if len({rank[name] for rank in ranks}) > 1]
    words = ["rank", *degrees, "pid", "node", "device"]
    has_experts = any(rank["expert_tokens"] for rank in ranks)
    table = Table()
    for name in (*words, "memory", "weights", "KV cache", "steps", *(["expert tokens"] if has_experts else [])):
        table.add_column(name.replace("_", " "), justify="left" if name in ("node", "device") else "right")
    for rank in ranks:
        table.add_row(
            *(str(rank[name]) for name in words),
            *(f"{rank[name] / _MB:.0f} MB" for name in ("memory_bytes", "weights_bytes", "kv_bytes")),
            str(rank["num_steps"]),
            *([str(rank["expert_tokens"])] if has_experts else []),
        )
    return table
