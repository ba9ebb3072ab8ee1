"""1,000 random schemas, and 200 grammars that nobody should have to follow, at a real server.

Every answer that is complete validates; what is hostile is refused soon, and a stream beside it hardly notices.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from itertools import pairwise
from typing import Any

import httpx
import jsonschema
from conftest import MODEL
from random_grammars import hostile_grammars, random_schema, strict

CHAT = "/v1/chat/completions"
NUM_SCHEMAS, NUM_AT_ONCE = 1000, 16
NUM_HOSTILE, SECONDS = 200, 2.0
SLOWER = 2.0  # that a stream may become beside them
NUM_GAPS = 300  # between tokens: what a stream alone is measured by
# The model is a random one of single bytes: without white space, and with what closes, its texts end soon.
BIAS = {"220": -100, "197": -100, "198": -100, "201": -100, "1": 1, "60": 1, "92": 1}


async def test_what_is_complete_validates(url: str) -> None:
    chance = random.Random(6)
    schemas = iter([random_schema(chance) for _ in range(NUM_SCHEMAS)])
    counts = Counter[str]()
    wrong: list[tuple[dict[str, Any], str]] = []

    async def work(client: httpx.AsyncClient) -> None:
        for schema in schemas:
            response = await client.post(CHAT, json=ask(response_format=strict(schema), logit_bias=BIAS))
            if response.status_code != 200:
                wrong.append((schema, response.text))
                continue
            (choice,) = response.json()["choices"]
            counts[choice["finish_reason"]] += 1
            if choice["finish_reason"] == "stop" and not validates(choice["message"]["content"], schema):
                wrong.append((schema, choice["message"]["content"]))

    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        await asyncio.gather(*(work(client) for _ in range(NUM_AT_ONCE)))
    sys.stdout.write(f"{NUM_SCHEMAS} schemas: {dict(counts)}, {len(wrong)} wrong\n")
    assert wrong == []
    assert counts["stop"] > NUM_SCHEMAS / 2


async def test_what_is_hostile_is_refused_and_a_stream_goes_on(url: str) -> None:
    grammars = list(hostile_grammars())
    assert len(grammars) >= NUM_HOSTILE
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        alone = statistics.median(await gaps(client, NUM_GAPS))
        told: dict[str, tuple[int, float, str]] = {}
        beside: list[float] = []
        is_over = asyncio.Event()

        async def stream() -> None:
            while not is_over.is_set():
                beside.extend(await gaps(client, NUM_GAPS))

        streaming = asyncio.create_task(stream())
        for name, fields in grammars:
            began = time.monotonic()
            response = await client.post(CHAT, json=ask(**fields))
            told[name] = response.status_code, time.monotonic() - began, response.text
        is_over.set()
        await streaming
    seconds = sorted(taken for _, taken, _ in told.values())
    statuses = Counter(status for status, _, _ in told.values())
    sys.stdout.write(
        f"{len(told)} hostile grammars: {dict(statuses)}, median {statistics.median(seconds):.3f} s, "
        f"longest {seconds[-1]:.3f} s; between tokens {alone * 1000:.2f} ms alone, "
        f"{statistics.median(beside) * 1000:.2f} ms beside them\n"
    )
    assert {name: answer for name, answer in told.items() if answer[0] != 400} == {}
    assert {name: answer for name, answer in told.items() if answer[1] >= SECONDS} == {}
    assert statistics.median(beside) < SLOWER * alone


def ask(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hi"}]
    return {"model": MODEL, "messages": messages, "enable_thinking": False, "max_tokens": 400, "seed": 1, **fields}


def validates(text: str, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


async def gaps(client: httpx.AsyncClient, count: int) -> list[float]:
    """Seconds between the tokens of one stream."""
    body = {"model": MODEL, "prompt": "Hi", "max_tokens": count, "ignore_eos": True, "return_token_ids": True}
    times: list[float] = []
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())
    return [later - earlier for earlier, later in pairwise(times)]
