"""`qwen-ray bench`: runs a load and shows what came of it."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from itertools import count
from typing import Any

from rich.table import Table

from qwen_ray.commands.console import out, progress_bars
from qwen_ray.commands.load import LoadSpec, RequestRecord, run_load
from qwen_ray.core.errors import QwenRayError

PERCENTILES = (50, 90, 95, 99)
LATENCIES = {
    "ttft_ms": "time to first token",
    "itl_ms": "inter-token latency",
    "tpot_ms": "time per output token",
    "e2e_ms": "end to end",
}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile of sorted values."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def distribution(seconds: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles and maximum in milliseconds; empty for no values."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    points = {f"p{p}": percentile(ordered, p) for p in PERCENTILES}
    figures = {"mean": sum(ordered) / len(ordered), **points, "max": ordered[-1]}
    return {name: round(value * 1000, 3) for name, value in figures.items()}


def summarize(records: Sequence[RequestRecord], seconds: float) -> dict[str, Any]:
    """All figures of one run, ready for JSON. Rates are per second over the whole run, of answered requests."""
    good = [record for record in records if record.error is None]
    tokens_in = sum(record.num_input_tokens for record in good)
    tokens_out = sum(record.num_output_tokens for record in good)
    return {
        "num_requests": len(records),
        "num_failed": len(records) - len(good),
        "errors": sorted({record.error for record in records if record.error})[:5],
        "seconds": round(seconds, 3),
        "num_input_tokens": tokens_in,
        "num_output_tokens": tokens_out,
        "requests_per_s": round(len(good) / seconds, 3),
        "output_tokens_per_s": round(tokens_out / seconds, 2),
        "total_tokens_per_s": round((tokens_in + tokens_out) / seconds, 2),
        "ttft_ms": distribution([record.ttft for record in good]),
        "itl_ms": distribution([gap for record in good for gap in record.gaps]),
        "tpot_ms": distribution([tpot for record in good if (tpot := record.tpot) is not None]),
        "e2e_ms": distribution([record.e2e for record in good]),
    }


def run_bench(spec: LoadSpec, *, as_json: bool) -> None:
    """Raises QwenRayError when no request at all was answered."""
    with progress_bars(quiet=as_json) as show:
        done = count(1)
        records, seconds = asyncio.run(run_load(spec, lambda _: show("requests", next(done), spec.num_requests)))
    summary = summarize(records, seconds)
    if as_json:
        out.print_json(json.dumps({"load": _described(spec), **summary}))
    else:
        _show(spec, summary)
    if summary["num_failed"] == len(records):
        raise QwenRayError(f"No request was answered: {'; '.join(summary['errors'])}")


def _described(spec: LoadSpec) -> dict[str, Any]:
    names = ("url", "model", "request_rate", "input_len", "output_len", "shared_prefix_len", "ignore_eos", "seed")
    described = {name: getattr(spec, name) for name in names}
    return described if spec.request_rate else {**described, "concurrency": spec.concurrency}


def _show(spec: LoadSpec, summary: dict[str, Any]) -> None:
    arrival = f"{spec.request_rate} requests/s" if spec.request_rate else f"{spec.concurrency} at once"
    out.print(
        f"{spec.model} at {spec.url}: {summary['num_requests']} requests, {arrival}, "
        f"{spec.input_len} tokens in, {spec.output_len} out, in {summary['seconds']:.1f} s"
    )
    table = Table(title="latency, ms", title_justify="left")
    columns = ("mean", *(f"p{p}" for p in PERCENTILES), "max")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for key, label in LATENCIES.items():
        figures = summary[key]
        table.add_row(label, *(f"{figures[column]:.1f}" if figures else "-" for column in columns))
    out.print(table)
    out.print(
        f"throughput: {summary['output_tokens_per_s']:.1f} output tokens/s, "
        f"{summary['total_tokens_per_s']:.1f} tokens/s in all, {summary['requests_per_s']:.2f} requests/s"
    )
    if summary["num_failed"]:
        out.print(f"[red]{summary['num_failed']} failed:[/] {'; '.join(summary['errors'])}")
