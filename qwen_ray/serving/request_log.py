"""One line in the log for every request, when it ends: who, what, how it ended, and where its time went.

Never what was said: that is `--log-requests`, and the audit log's.
"""

from __future__ import annotations

import logging
import re
import secrets
from typing import Any

from qwen_ray.serving.call import Call

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
# What clients make up stands in logs, traces and the answer's headers.
SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/+=-]{0,127}")


def sane_request_id(given: str) -> str:
    """What the client calls its request, if that is fit for logs; otherwise a name of ours."""
    return given if SANE_ID.fullmatch(given) else f"req-{secrets.token_hex(16)}"


def log_request(call: Call, route: str, status: int | None, ended: float, trace_id: str = "") -> None:
    """`status` is None when the client left before an answer began; `ended` in seconds since the epoch."""
    if not logger.isEnabledFor(logging.INFO):
        return
    fields = request_fields(call, route, status, ended)
    if trace_id:
        fields["trace_id"] = trace_id
    shown = " ".join(f"{name}={value}" for name, value in fields.items() if name not in ("method", "route", "status"))
    logger.info("%s %s %s %s", call.method, route, status or "-", shown, extra={"fields": fields})


def request_fields(call: Call, route: str, status: int | None, ended: float) -> dict[str, Any]:
    """Times in seconds; what a request did not come to is left out."""
    trail = call.trail
    fields: dict[str, Any] = {
        "method": call.method,
        "route": route,
        "status": status,
        "finish_reason": call.outcome_of(status),
        "model": call.model,
        "key": call.caller.id,
        "id": call.answer_id,
        "prompt_tokens": call.num_prompt_tokens,
        "cached_tokens": trail.num_cached_tokens,
        "completion_tokens": call.num_output_tokens,
        "replica": " ".join(trail.replicas),
        "hand_overs": len(trail.moves),
    }
    fields = {name: value for name, value in fields.items() if value or name == "status"}
    if trail.dispatched:
        for segment in trail.segments(call.arrival, ended):
            fields[f"{segment.name}_seconds"] = round(segment.seconds, 4)
    if trail.first_token:
        fields["ttft_seconds"] = round(trail.first_token - call.arrival, 4)
    return {**fields, "total_seconds": round(ended - call.arrival, 4)}
