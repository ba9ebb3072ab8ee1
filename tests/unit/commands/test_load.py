"""The load generator against a server that streams what it is told to."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest

from qwen_ray.commands.bench import distribution, percentile, run_bench, summarize
from qwen_ray.commands.load import LoadSpec, RequestRecord, run_load, served_model
from qwen_ray.core.errors import QwenRayError, SourceError


def _event(data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _stream(num_tokens: int, prompt_len: int) -> list[bytes]:
    usage = {"prompt_tokens": prompt_len, "completion_tokens": num_tokens}
    return [
        *(_event({"choices": [{"text": "x"}]}) for _ in range(num_tokens)),
        _event({"choices": [], "usage": usage}),
        b"data: [DONE]\n\n",
    ]


class Recorder:
    """Answers completions, and keeps what it was asked and how many requests were open at once."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.most_open = 0
        self._open = 0
        self._lock = threading.Lock()

    def __call__(self, method: str, path: str, body: Any) -> tuple[int, str, list[bytes]]:
        assert (method, path) == ("POST", "/v1/completions")
        with self._lock:
            self.bodies.append(body)
            self._open += 1
            self.most_open = max(self.most_open, self._open)
        time.sleep(0.02)
        with self._lock:
            self._open -= 1
        return 200, "text/event-stream", _stream(body["max_tokens"], len(body["prompt"]))


def _run(spec: LoadSpec) -> tuple[list[RequestRecord], float]:
    return asyncio.run(run_load(spec, lambda _: None))


def test_every_request_is_sent_and_counted(http_server: Any) -> None:
    server = Recorder()
    spec = LoadSpec(url=http_server(server), model="m", num_requests=6, concurrency=2, input_len=9, output_len=5)
    records, seconds = _run(spec)
    assert [record.error for record in records] == [None] * 6
    assert server.most_open == 2
    assert sorted(map(str, (body["prompt"] for body in server.bodies))) == sorted(str(spec.prompt(i)) for i in range(6))
    assert all(body["ignore_eos"] and body["stream"] and body["temperature"] == 0 for body in server.bodies)
    summary = summarize(records, seconds)
    assert (summary["num_input_tokens"], summary["num_output_tokens"], summary["num_failed"]) == (54, 30, 0)
    assert all(len(record.gaps) == 4 and record.tpot is not None for record in records)
    assert summary["ttft_ms"]["p50"] <= summary["e2e_ms"]["p50"]


def test_request_rate_does_not_wait_for_answers(http_server: Any) -> None:
    server = Recorder()
    spec = LoadSpec(url=http_server(server), model="m", num_requests=5, concurrency=1, request_rate=1e6, output_len=1)
    records, _ = _run(spec)
    assert [record.error for record in records] == [None] * 5
    assert server.most_open > 1


def test_refusals_and_broken_streams_are_failures(http_server: Any) -> None:
    answers = iter(
        [
            (400, "application/json", [b'{"error": {"message": "no such field"}}']),
            (200, "text/event-stream", _stream(3, 1)[:2]),
            (200, "text/event-stream", [_event({"error": {"message": "rank died"}}), b"data: [DONE]\n\n"]),
            (200, "text/event-stream", [b"data: [DONE]\n\n"]),
        ]
    )
    url = http_server(lambda *_: next(answers))
    records, seconds = _run(LoadSpec(url=url, model="m", num_requests=4, concurrency=1))
    errors = [record.error or "" for record in records]
    assert "HTTP 400" in errors[0]
    assert errors[1:] == ["the stream broke off before [DONE]", "rank died", "the stream ended without a token"]
    assert summarize(records, seconds)["num_failed"] == 4


def test_bench_ends_with_an_error_when_nothing_was_answered(
    http_server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    url = http_server(lambda *_: (500, "text/plain", [b"broken"]))
    with pytest.raises(QwenRayError, match="HTTP 500: broken"):
        run_bench(LoadSpec(url=url, model="m", num_requests=2), as_json=True)
    assert json.loads(capsys.readouterr().out)["num_failed"] == 2


def test_the_model_is_asked_of_the_server(http_server: Any) -> None:
    url = http_server(lambda *_: (200, "application/json", [b'{"data": [{"id": "first"}, {"id": "second"}]}']))
    assert served_model(url) == "first"
    with pytest.raises(SourceError, match="No OpenAI endpoint"):
        served_model(http_server(lambda *_: (200, "application/json", [b"[]"])))


def test_prompts_share_what_they_are_told_to_and_no_more() -> None:
    spec = LoadSpec(url="", model="m", input_len=32, shared_prefix_len=20, vocab_size=30_000)
    first, second = spec.prompt(0), spec.prompt(1)
    assert len(first) == 32
    assert first[:20] == second[:20]
    assert first[20:] != second[20:]
    assert first == spec.prompt(0)


def test_percentiles_are_nearest_rank() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, p) for p in (50, 90, 99, 100)] == [50.0, 90.0, 99.0, 100.0]
    assert percentile([7.0], 50) == 7.0
    assert distribution([]) == {}
    assert distribution([0.001, 0.003])["mean"] == 2.0
