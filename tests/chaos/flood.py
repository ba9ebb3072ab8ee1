"""Many requests at once: `python -m chaos.flood URL KEY COUNT BODY` writes how often each status came, as JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from urllib.parse import urlsplit


async def post(url: str, body: object, key: str = "none") -> tuple[int, str, str]:
    """(status, headers, body), over a connection of its own. A client library would take longer than the server."""
    place = urlsplit(url)
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n"
    head += f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        writer.write(head.encode() + content)
        answer = await reader.read()
    finally:
        writer.close()
    headers, _, text = answer.decode().partition("\r\n\r\n")
    return int(headers.split(maxsplit=2)[1]), headers, text


async def _statuses(url: str, key: str, count: int, body: object) -> dict[int, int]:
    answers = await asyncio.gather(*(post(url, body, key) for _ in range(count)))
    return Counter(status for status, _, _ in answers)


if __name__ == "__main__":
    url, key, count, body = sys.argv[1:]
    json.dump(asyncio.run(_statuses(url, key, int(count), json.loads(body))), sys.stdout)
