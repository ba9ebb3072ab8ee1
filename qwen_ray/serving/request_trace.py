"""The trace of a request: what its spans are called and what they say, in OpenTelemetry's words for HTTP and GenAI."""

from __future__ import annotations

from collections.abc import Iterable

from qwen_ray.serving.call import Call
from qwen_ray.tracing import CONTEXT_HEADERS, Happening, Part, Tracer

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
SERVER_ERROR = 500
MAX_CONTEXT = 512  # characters of a header of the client's, as W3C asks for at least


def trace_context(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The client's part of the trace, from its headers; what no W3C context can be is left out."""
    names = {name.encode(): name for name in CONTEXT_HEADERS}
    found = {names[name]: value.decode("latin-1") for name, value in headers if name in names}
    return {
        name: value
        for name, value in found.items()
        if len(value) <= MAX_CONTEXT and value.isascii() and value.isprintable()
    }


def trace_request(
    tracer: Tracer, call: Call, route: str, status: int | None, ended: float, context: dict[str, str]
) -> str:
    """The id of the trace, "" where it is not sampled. `status` is None when the client left before an answer began."""
    trail = call.trail
    parts = [Part(name=one.name, start=one.start, end=one.end) for one in trail.segments(call.arrival, ended)]
    outcome = call.outcome_of(status)
    is_failed = status is None or status >= SERVER_ERROR or outcome == "error"
    return tracer.record(
        Part(name=f"{call.method} {route}", start=call.arrival, end=ended),
        parts,
        context=context,
        attributes=_attributes(call, route, status, outcome, {part.name: part.end - part.start for part in parts}),
        happenings=[
            Happening(name="hand-over", time=move.time, attributes={"qwen_ray.replica": move.replica})
            for move in trail.moves
        ],
        is_error=is_failed,
    )


def _attributes(
    call: Call, route: str, status: int | None, outcome: str, seconds: dict[str, float]
) -> dict[str, str | int | float | list[str]]:
    """What there is nothing to say of is left out. `gen_ai.latency.*` are vLLM's."""
    trail = call.trail
    said: dict[str, str | int | float | list[str] | None] = {
        "http.request.method": call.method,
        "http.route": route,
        "http.response.status_code": status,
        "error.type": outcome if status is None or status >= 400 else None,
        "qwen_ray.request_id": call.request_id,
        "qwen_ray.api_key": call.caller.id,
    }
    if call.model:
        said |= {
            "gen_ai.operation.name": OPERATIONS.get(route, route.rpartition("/")[2]),
            "gen_ai.provider.name": "qwen_ray",
            "gen_ai.request.model": call.model,
        }
    if trail.dispatched:
        said |= {
            "gen_ai.response.model": call.model,
            "gen_ai.response.id": call.answer_id,
            "gen_ai.response.finish_reasons": outcome.split(),
            "gen_ai.usage.input_tokens": call.num_prompt_tokens,
            "gen_ai.usage.output_tokens": call.num_output_tokens,
            "gen_ai.usage.cache_read.input_tokens": trail.num_cached_tokens,
            "gen_ai.latency.time_in_queue": seconds.get("queue"),
            "gen_ai.latency.time_to_first_token": trail.first_token - call.arrival if trail.first_token else None,
            "gen_ai.latency.e2e": sum(seconds.values()),
            "qwen_ray.replicas": list(trail.replicas),
            "qwen_ray.hand_overs": len(trail.moves),
        }
    return {name: value for name, value in said.items() if value not in (None, "", [])}
