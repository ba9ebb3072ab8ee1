"""The smallest OpenAI-compatible server: for engines that come without one, so that all are measured over HTTP.

Runs in a peer's environment: the standard library only. Knows `/v1/completions` with token ids, streamed; no text is
made, which is to the peer's advantage. An engine is anything that gives token ids as they come.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Protocol


class Engine(Protocol):
    def stream(self, prompt: list[int], num_tokens: int) -> AsyncIterator[list[int]]:
        """New token ids of a greedy answer that no end token ends. Runs on the event loop."""
        ...


async def serve(engine: Engine, port: int) -> None:
    """Until the process ends."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            body = await _read_body(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
            count = 0
            async for ids in engine.stream(body["prompt"], body["max_tokens"]):
                count += len(ids)
                writer.write(_event({"choices": [{"index": 0, "text": "", "token_ids": ids}]}))
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
            writer.write(_event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
            await writer.drain()
        except (ConnectionError, EOFError):
            pass  # the client went away
        finally:
            writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", port) as server:
        await server.serve_forever()


async def _read_body(reader: asyncio.StreamReader) -> dict[str, Any]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = next(line.partition(":")[2] for line in head.splitlines() if line.startswith("content-length:"))
    return json.loads(await reader.readexactly(int(length)))


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"
