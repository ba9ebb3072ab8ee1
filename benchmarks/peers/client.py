"""One client for every server: `/v1/completions` with a prompt of token ids, streamed, each chunk with its time.

Knows HTTP/1.1 and server-sent events over plain asyncio streams, which take a tenth of what a full HTTP library takes:
the client runs on the cores that the servers need. While a request runs it keeps bytes and times only; they are read
afterwards. A chunk may carry several tokens (broken characters are held back by some servers), so tokens are counted,
not chunks: by the ids in it, or by the running count that llama.cpp gives.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

LINE_LIMIT = 2**24


class RequestFailed(Exception):
    """The server refused, broke off, or gave another number of tokens than it was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    port: int
    model: str
    extra_body: dict[str, Any]  # what makes this server ignore the end token and say how many tokens a chunk has
    timeout: float = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came for one request: when, and how many tokens each time. Seconds of one clock."""

    started: float
    arrivals: tuple[tuple[float, int], ...]

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def ttft(self) -> float:
        return self.arrivals[0][0] - self.started

    @property
    def ended(self) -> float:
        return self.arrivals[-1][0]

    @property
    def chunk_gaps(self) -> list[float]:
        """Between neighbouring chunks: what a reader sees."""
        times = [at for at, _ in self.arrivals]
        return [b - a for a, b in pairwise(times)]

    @property
    def token_gaps(self) -> list[float]:
        """Inter-token latencies: a chunk's gap shared evenly by its tokens, so that one which waited for the next
        to make a whole character does not count as two steps in one."""
        counts = [count for _, count in self.arrivals[1:]]
        return [gap / n for gap, n in zip(self.chunk_gaps, counts, strict=True) for _ in range(n)]

    @property
    def tokens_per_second(self) -> float:
        """Of all after the first chunk."""
        return (self.num_tokens - self.arrivals[0][1]) / (self.ended - self.arrivals[0][0])


async def complete(endpoint: Endpoint, prompt: Sequence[int], num_tokens: int) -> Answer:
    """Greedy, exactly `num_tokens`. Raises RequestFailed."""
    body = {
        "model": endpoint.model,
        "prompt": list(prompt),
        "max_tokens": num_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **endpoint.extra_body,
    }
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{endpoint.port}\r\nContent-Type: application/json\r\n"
        f"Accept: text/event-stream\r\nConnection: close\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    started = time.perf_counter()
    pieces: list[tuple[float, bytes]] = []
    try:
        async with asyncio.timeout(endpoint.timeout):
            reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port, limit=LINE_LIMIT)
            try:
                writer.write(head.encode() + payload)
                async for piece in _body(reader):
                    pieces.append((time.perf_counter(), piece))
            finally:
                writer.close()
    except (OSError, EOFError, TimeoutError, ValueError) as error:
        raise RequestFailed(f"{type(error).__name__}: {error}") from error
    return Answer(started=started, arrivals=tuple(read_events(pieces, num_tokens)))


async def _body(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The parts of an answer's body as they arrive. Raises RequestFailed for any status but 200."""
    status = await reader.readline()
    headers: dict[str, str] = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip().lower()
    if status.split(b" ")[1:2] != [b"200"]:
        text = await reader.read(2000)
        raise RequestFailed(f"{status.decode('latin-1').strip()}: {text.decode(errors='replace')}")
    if headers.get("transfer-encoding") != "chunked":
        while piece := await reader.read(2**16):
            yield piece
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


def read_events(pieces: Sequence[tuple[float, bytes]], wanted: int) -> Iterator[tuple[float, int]]:
    """Time and number of tokens of every event that brought any; an event has the time of the piece that ended it.

    Raises RequestFailed when the server said so, or when tokens, usage and `wanted` are not one number.
    """
    count, used, is_done = 0, None, False
    for at, data in _events(pieces):
        if data == b"[DONE]":
            is_done = True
            continue
        event: dict[str, Any] = json.loads(data)
        if event.get("error"):
            raise RequestFailed(str(event["error"]))
        if usage := event.get("usage"):
            used = usage["completion_tokens"]
        if new := _num_tokens(event, count):
            count += new
            yield at, new
    if not is_done:
        raise RequestFailed("the stream broke off before [DONE]")
    if not count == used == wanted:
        raise RequestFailed(f"{wanted} tokens were asked for, {count} came, and usage says {used}")


def _events(pieces: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    rest = b""
    for at, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield at, line.removeprefix(b"data:").strip()


def _num_tokens(event: dict[str, Any], count: int) -> int:
    """New tokens of an event, where `count` came before."""
    if "timings" in event:  # llama.cpp's running count
        return event["timings"]["predicted_n"] - count
    return sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))
