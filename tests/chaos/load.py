"""Requests of every kind, streamed by several clients at once, and what each of them said. Not a test.

The same request gives the same answer whenever it is asked: seeds are fixed. So an answer seen in peace is what
every later one is judged by.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx

FRUITLESS = httpx.HTTPError, ValueError, KeyError

PROMPTS = (
    "Write a long story about a lighthouse keeper and a storm.",
    "Explain, step by step, how bread is made.",
    "List the months of the year and one holiday in each of them.",
    "Describe the life of a river from its spring to the sea.",
)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
LONG_PROMPT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request of a kind. `name` is the kind and the prompt."""

    name: str
    path: str
    body: dict[str, Any] = field(hash=False)

    @property
    def kind(self) -> str:
        return self.name.split("/")[0]


@dataclass(slots=True, kw_only=True)
class Seen:
    """What one request gave. `texts`, `reasons` and `logprobs` by choice; `times` of each piece, monotonic seconds."""

    ask: Ask
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[tuple[str, float]]] = field(default_factory=dict)
    usage: tuple[int, int] | None = None  # prompt tokens, completion tokens
    error: str | None = None
    times: list[float] = field(default_factory=list)

    def differs(self, expected: Seen) -> str | None:
        """How it is not what was expected; None if it is. Log-probabilities may differ in their fourth digit."""
        for what in ("texts", "reasons", "usage"):
            if getattr(self, what) != getattr(expected, what):
                return f"{what}: {getattr(self, what)!r} in place of {getattr(expected, what)!r}"
        for choice, entries in expected.logprobs.items():
            own = self.logprobs.get(choice, [])
            if [token for token, _ in own] != [token for token, _ in entries]:
                return f"logprobs of choice {choice}: {len(own)} tokens in place of {len(entries)}, or other ones"
            if any(abs(a - b) > 1e-3 for (_, a), (_, b) in zip(own, entries, strict=True)):
                return f"logprobs of choice {choice}: values"
        return None


def every_kind(model: str, *, max_tokens: int = 48) -> list[Ask]:
    """One request of each kind for each prompt."""
    common = {"model": model, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": max_tokens}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "greedy": ("completions", {"temperature": 0}),
        "seeded": ("completions", {"temperature": 0.9, "top_p": 0.95, "seed": 7}),
        "n": ("completions", {"temperature": 0.8, "seed": 11, "n": 3, "max_tokens": max_tokens // 2}),
        "logprobs": ("completions", {"temperature": 0, "logprobs": 3}),
        "stop": ("completions", {"temperature": 0, "stop": ["\n\n", "winter"]}),
        "penalties": (
            "completions",
            {
                "temperature": 0.7,
                "seed": 3,
                "presence_penalty": 0.5,
                "frequency_penalty": 0.5,
                "repetition_penalty": 1.1,
            },
        ),
        "bias": ("completions", {"temperature": 0, "logit_bias": {"28": -5}, "min_tokens": max_tokens // 2}),
        "chat": ("chat/completions", {"temperature": 0}),
        "chat-n-logprobs": (
            "chat/completions",
            {"temperature": 1.0, "seed": 5, "n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": max_tokens // 2},
        ),
        "schema": (
            "chat/completions",
            {
                "temperature": 0.8,
                "seed": 13,
                "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
            },
        ),
        "regex": (
            "completions",
            {
                "temperature": 0.9,
                "seed": 17,
                "structured_outputs": {"regex": r"[A-Z][a-z]{2,8}( [a-z]{2,8}){3,9}\."},
            },
        ),
        "whole": ("chat/completions", {"temperature": 0, "stream": False, "stream_options": None}),
        "echo": ("completions", {"temperature": 0, "echo": True, "logprobs": 1, "max_tokens": max_tokens // 2}),
        "long": ("completions", {"temperature": 0, "prompt": LONG_PROMPT, "max_tokens": max_tokens // 4}),
    }
    asks: list[Ask] = []
    for kind, (path, options) in kinds.items():
        for i, prompt in enumerate(PROMPTS):
            given = {"messages": [{"role": "user", "content": prompt}]} if "chat" in path else {"prompt": prompt}
            body = {key: value for key, value in {**common, **given, **options}.items() if value is not None}
            asks.append(Ask(name=f"{kind}/{i}", path=f"/v1/{path}", body=body))
    return asks


async def run(client: httpx.AsyncClient, ask: Ask) -> Seen:
    """Never raises: what went wrong is in `error`."""
    seen = Seen(ask=ask)
    try:
        if not ask.body.get("stream"):
            answer = await client.post(ask.path, json=ask.body)
            answer.raise_for_status()
            _take(seen, answer.json())
        else:
            async for event in _events(client, ask):
                _take(seen, event)
            if len(seen.reasons) != ask.body.get("n", 1):
                seen.error = f"cut off: {len(seen.reasons)} of {ask.body.get('n', 1)} choices have ended"
    except FRUITLESS as error:
        text = error.response.text if isinstance(error, httpx.HTTPStatusError) and error.response.is_closed else ""
        seen.error = f"{type(error).__name__}: {error} {text}".strip()
    return seen


async def _events(client: httpx.AsyncClient, ask: Ask) -> AsyncIterator[dict[str, Any]]:
    async with client.stream("POST", ask.path, json=ask.body) as answer:
        if answer.status_code != 200:
            await answer.aread()
            answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise ValueError(f"the stream says: {event['error']}")
                yield event


def _take(seen: Seen, event: dict[str, Any]) -> None:
    seen.times.append(time.monotonic())
    for choice in event["choices"]:
        index = choice["index"]
        part = choice.get("delta") or choice.get("message") or {}
        text = (part.get("content") if part else choice.get("text")) or ""
        seen.texts[index] = seen.texts.get(index, "") + text
        if choice.get("finish_reason"):
            seen.reasons[index] = choice["finish_reason"]
        seen.logprobs.setdefault(index, []).extend(_logprobs(choice.get("logprobs")))
    if usage := event.get("usage"):
        seen.usage = usage["prompt_tokens"], usage["completion_tokens"]


def _logprobs(raw: dict[str, Any] | None) -> Iterable[tuple[str, float]]:
    if not raw:
        return []
    if raw.get("content") is not None:
        return [(entry["token"], entry["logprob"]) for entry in raw["content"]]
    pairs = zip(raw["tokens"], raw["token_logprobs"], strict=True)
    return [(token, 0.0 if logprob is None else logprob) for token, logprob in pairs]


async def in_peace(url: str, asks: Iterable[Ask], *, num_clients: int = 8) -> dict[str, Seen]:
    """What each request says when nothing is disturbed, by name. Raises AssertionError if one fails even so."""
    seen = await many(url, asks, num_clients=num_clients)
    failed = [f"{one.ask.name}: {one.error}" for one in seen if one.error]
    assert not failed, failed
    return {one.ask.name: one for one in seen}


async def many(url: str, asks: Iterable[Ask], *, num_clients: int) -> list[Seen]:
    """All of them, `num_clients` at a time."""
    queue, found = iter(asks), []

    async def work(client: httpx.AsyncClient) -> None:
        for ask in queue:
            found.append(await run(client, ask))

    async with _client(url) as client:
        await asyncio.gather(*(work(client) for _ in range(num_clients)))
    return found


async def until(done: asyncio.Event, url: str, asks: list[Ask], *, num_clients: int) -> list[Seen]:
    """The same over and over, until `done`; what is under way then goes to its end."""
    found: list[Seen] = []
    turns = itertools.cycle(asks)

    async def work(client: httpx.AsyncClient) -> None:
        while not done.is_set():
            found.append(await run(client, next(turns)))

    async with _client(url) as client:
        await asyncio.gather(*(work(client) for _ in range(num_clients)))
    return found


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(300.0), limits=limits)
