"""A real server behind its proxy: the trace that a collector gets, the line in the log, and the id in the answer."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
from otlp_receiver import receiving, values
from served import serving
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
LOGS = Path("/tmp/ray")
MILLISECOND = 10**6  # in a span's nanoseconds


def log_lines(request_id: str) -> list[dict[str, Any]]:
    """Of all processes of ours, those that tell of the request."""
    files = sorted(LOGS.glob("session_2*/logs/worker-*.err"), key=lambda file: file.stat().st_mtime)[-200:]
    lines = [line for file in files for line in file.read_text(errors="replace").splitlines()]
    return [json.loads(line) for line in lines if request_id in line]


def test_a_trace_of_a_real_server(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    request_id = f"test/{time.time_ns()}"
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": request_id}
    body = {"prompt": [1, 2, 3], "max_tokens": 8, "ignore_eos": True}
    flags = ("--load-format", "dummy", "--kv-cache-memory", "1MiB", "--no-standby-ranks", "--log-format", "json")
    with receiving() as collector, serving(str(tmp_path), *flags, "--otlp-traces-endpoint", collector.url) as url:
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text
        named = httpx.get(f"{url}/v1/models", headers={"X-Request-Id": "not sane"}, timeout=60)
        collector.until(8, seconds=60)
        lines = log_lines(request_id)
    assert answer.headers.get_list("x-request-id") == [request_id]
    assert named.headers.get_list("x-request-id")[0].startswith("req-")
    root, children = collector.trace("POST /v1/completions")
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    assert list(children) == ["ingress", "queue", "prefill", "decode", "respond"]
    whole = root.end_time_unix_nano - root.start_time_unix_nano
    parts = [child.end_time_unix_nano - child.start_time_unix_nano for child in children.values()]
    assert abs(sum(parts) - whole) < 2 * MILLISECOND
    ends = [child.end_time_unix_nano for child in children.values()]
    assert ends == sorted(ends)
    assert min(parts) >= 0  # a queue that is empty takes no time
    assert min(parts[2:4]) > 0
    assert values(root.attributes)["gen_ai.usage.output_tokens"] == 8
    (line,) = lines
    assert (line["route"], line["completion_tokens"], line["trace_id"]) == ("/v1/completions", 8, TRACE)
    assert line["process"].startswith("ingress")
