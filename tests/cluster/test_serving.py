"""Real Ray, Serve in HAProxy mode, an ingress, a replica and two ranks with a tiny random model; clients over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError, OpenAI
from prometheus_client.parser import text_string_to_metric_families
from tiny_model import write_tiny_model

from qwen_ray.commands.ports import free_ports
from qwen_ray.metrics.catalog import BY_OWNER

START_SECONDS = 240
HI: Any = [{"role": "user", "content": "Hi"}]
PROMPT = "The quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    (port,) = free_ports(1)
    command = [
        sys.executable,
        "-c",
        "from qwen_ray.cli import main; main()",
        "serve",
        str(checkpoint),
        "--tp",
        "2",
        "--port",
        str(port),
    ]
    options = ["--max-model-len", "512", "--kv-cache-memory", "4MiB", "--dtype", "float32", "--price-per-hour", "2"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(process, address)
        yield address
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output


def _wait_until_ready(process: subprocess.Popen[str], address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"not ready within {START_SECONDS} s"
        try:
            if httpx.get(f"{address}/health/ready", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_official_client_streams_what_it_gets_whole(client: OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": HI, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 24
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.choices[0].finish_reason == chunks[-2].choices[0].finish_reason


def test_a_spent_thinking_budget_ends_the_thinking(client: OpenAI) -> None:
    thinks = {"enable_thinking": True, "thinking_budget": 0}
    asked: Any = {"model": "tiny", "messages": HI, "max_tokens": 140, "temperature": 0, "extra_body": thinks}
    whole = client.chat.completions.create(**asked)
    message: Any = whole.choices[0].message
    assert message.reasoning_content.startswith("Considering the limited time by the user")
    assert message.reasoning_content.endswith("directly now.")
    assert whole.usage is not None
    assert whole.usage.completion_tokens_details is not None
    assert whole.usage.completion_tokens_details.reasoning_tokens == len(f"\n\n{message.reasoning_content}\n") + 1
    deltas: Any = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == message.reasoning_content
    assert "".join(delta.content or "" for delta in deltas) == message.content


def test_choices_logprobs_and_stop_strings(client: OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, n=2, max_tokens=12, temperature=0, logprobs=3, extra_body={"ignore_eos": True}
    )
    first, second = answer.choices
    assert first.text == second.text
    assert first.logprobs is not None
    assert first.logprobs.tokens is not None
    assert len(first.logprobs.tokens) == 12
    stop = next(token for token in first.logprobs.tokens if token.isprintable() and not token.startswith("bytes:"))
    again = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, stop=stop)
    assert again.choices[0].text == first.text[: first.text.index(stop)]
    assert again.choices[0].finish_reason == "stop"


def test_the_same_seed_gives_the_same_text(client: OpenAI) -> None:
    def sample(seed: int) -> str:
        asked: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 1.0, "seed": seed}
        return client.completions.create(**asked).choices[0].text

    assert sample(5) == sample(5) != sample(6)


def test_wrong_requests_leave_the_server_unharmed(client: OpenAI, url: str) -> None:
    chat = f"{url}/v1/chat/completions"
    table: list[tuple[dict[str, Any], int, str | None]] = [
        ({"content": b"{not json", "headers": {"Content-Type": "application/json"}}, 400, None),
        ({"json": {"messages": HI, "model": "other"}}, 404, "model"),
        ({"json": {"messages": HI, "max_tokens": -1}}, 400, "max_tokens"),
        ({"json": {"messages": HI, "temperature": "hot"}}, 400, "temperature"),
        ({"json": {"messages": HI, "n": 1000}}, 400, "n"),
        ({"json": {"messages": [{"role": "user", "content": "x" * 1000}]}}, 400, "messages"),
        ({"json": {"messages": [{"role": "user", "content": "x" * 10_000_000}]}}, 413, None),
    ]
    for sent, status, param in table:
        response = httpx.post(chat, timeout=60, **sent)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (status, param), error
        assert set(error) == {"message", "type", "param", "code"}
    with pytest.raises(APIStatusError, match="fills nothing in"):
        client.completions.create(model="tiny", prompt="x", suffix="y")
    assert httpx.get(f"{url}/health").status_code == 200


def test_health_version_and_models(client: OpenAI, url: str) -> None:
    for path in ("/health", "/health/live", "/health/ready", "/health/startup", "/version"):
        assert httpx.get(url + path).status_code == 200
    startup = httpx.get(f"{url}/health/startup").json()
    assert startup["replicas"][0]["stage"] == "ready"
    assert startup["replicas"][0]["bytes_done"] == startup["replicas"][0]["bytes_total"] > 0
    assert [model.id for model in client.models.list()] == ["tiny"]


async def test_64_mixed_requests_with_disconnects_leave_the_pool_full(url: str) -> None:
    draw = random.Random(0)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=64)) as http:
        outcomes = await asyncio.gather(*(_one_request(http, draw.randrange(2**32)) for _ in range(64)))
        assert outcomes.count("done") > 10
        assert outcomes.count("left") > 10
        assert len(outcomes) == outcomes.count("done") + outcomes.count("left")
        async with asyncio.timeout(60):
            while not await _is_idle(http):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        text = (await http.get("/metrics")).text
    names = {family.name for family in text_string_to_metric_families(text)}
    for rows in BY_OWNER.values():
        for row in rows:
            assert (row.name.removesuffix("_total") if row.kind == "counter" else row.name) in names
    totals = {
        sample.labels["finished_reason"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "vllm:request_success_total"
    }
    assert totals["abort"] > 0
    assert totals["error"] == 0
    assert text.count("qwen_ray_rank_steps_total{") == 2


@pytest.mark.parametrize("victim", ["rank", "replica"])
def test_a_stream_survives_its(victim: str, url: str) -> None:
    """The ranks are started anew, or the replica is; the client sees a pause, and then the same tokens as ever."""
    body = {"prompt": PROMPT, "max_tokens": 300, "seed": 7, "ignore_eos": True}
    undisturbed = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    text = ""
    with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=150) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            before, text = text, text + json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            if len(before) < 20 <= len(text):
                (replica,) = httpx.get(f"{url}/status").json()["replicas"]
                pid = replica["pid"] if victim == "replica" else replica["ranks"][1]["pid"]
                os.kill(pid, signal.SIGKILL)
    assert text == undisturbed
    assert httpx.get(f"{url}/health/ready").status_code == 200


async def _one_request(http: httpx.AsyncClient, seed: int) -> str:
    """Reads all of an answer; or leaves after some events of a stream, or before there is an answer at all."""
    draw = random.Random(seed)
    is_stream, leaves = seed % 2 == 0, draw.random() < 0.5
    body = {"prompt": "x" * draw.randint(1, 200), "max_tokens": draw.randint(20, 200), "ignore_eos": True}
    patience = draw.uniform(0.0, 0.3) if leaves and not is_stream else 120.0
    num_events = draw.randint(1, 15) if leaves else 1000
    text = ""
    try:
        async with (
            asyncio.timeout(patience),
            http.stream("POST", "/v1/completions", json={**body, "seed": seed % 1000, "stream": is_stream}) as response,
        ):
            assert response.status_code == 200
            async for line in response.aiter_lines():
                text += line
                num_events -= line.startswith("data:")
                if num_events == 0:
                    return "left"
    except TimeoutError:
        return "left"
    assert text.endswith("data: [DONE]") if is_stream else '"finish_reason":"length"' in text
    return "done"


async def _is_idle(http: httpx.AsyncClient) -> bool:
    """Nothing runs or waits, and every block is free."""
    (replica,) = (await http.get("/status")).json()["replicas"]
    return not any(replica["engine"][name] for name in ("num_used_blocks", "num_running", "num_waiting"))
