"""Traces in OpenTelemetry's form, sent to a collector over OTLP/HTTP. Knows spans and attributes; no requests.

A trace is handed over when its request has ended, with all its times: while it runs, nothing is kept and nothing is
done. Batches are sent by a thread of their own; what a collector that is slow or gone cannot take is dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

TRACES_PATH = "/v1/traces"
EXPORT_SECONDS = 3.0  # for one batch, retries included
CLOSE_SECONDS = 2.0
MAX_SPANS = 4096  # that wait to be sent
SCHEDULE_MILLISECONDS = 1000
CONTEXT_HEADERS = ("traceparent", "tracestate")

Attributes = Mapping[str, str | int | float | bool | Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """At a moment, in seconds since the epoch."""

    name: str
    time: float
    attributes: Attributes


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A child span; seconds since the epoch."""

    name: str
    start: float
    end: float


class Tracer:
    """`endpoint`: of a collector, http(s)://HOST:PORT, or the whole URL where its path is another than /v1/traces.

    `sample_rate`: the share of traces that is kept, where whoever sends the request has not decided that.
    """

    def __init__(self, endpoint: str, sample_rate: float, instance: str) -> None:
        exporter = OTLPSpanExporter(endpoint=traces_url(endpoint), timeout=EXPORT_SECONDS)
        self._sender = BatchSpanProcessor(
            exporter, max_queue_size=MAX_SPANS, schedule_delay_millis=SCHEDULE_MILLISECONDS
        )
        resource = Resource.create({"service.name": "qwen-ray", "service.instance.id": instance})
        # Ended by `close`, which does not wait for a collector that is gone.
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_rate)), resource=resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(self._sender)
        self._tracer = self._provider.get_tracer("qwen_ray")
        self._propagator = TraceContextTextMapPropagator()

    def record(
        self,
        whole: Part,
        parts: Sequence[Part],
        *,
        context: Mapping[str, str],
        attributes: Attributes,
        happenings: Sequence[Happening] = (),
        is_error: bool = False,
    ) -> str:
        """A server span, and a child for each of `parts`. `context`: the client's `traceparent` and `tracestate`.

        Returns the id of the trace in hexadecimal, "" where it is not sampled.
        """
        parent = self._propagator.extract(context)
        span = self._tracer.start_span(
            whole.name,
            parent,
            kind=trace.SpanKind.SERVER,
            attributes=dict(attributes),
            start_time=_nanoseconds(whole.start),
        )
        if not span.is_recording():
            return ""
        for happening in happenings:
            span.add_event(happening.name, dict(happening.attributes), _nanoseconds(happening.time))
        if is_error:
            span.set_status(trace.StatusCode.ERROR)
        inside = trace.set_span_in_context(span, parent)
        for part in parts:
            child = self._tracer.start_span(part.name, inside, start_time=_nanoseconds(part.start))
            child.end(_nanoseconds(part.end))
        span.end(_nanoseconds(whole.end))
        return trace.format_trace_id(span.get_span_context().trace_id)

    def close(self) -> None:
        """Sends what waits, in CLOSE_SECONDS at most."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)


def traces_url(endpoint: str) -> str:
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + TRACES_PATH


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
