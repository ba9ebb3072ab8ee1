"""The program that Serve calls in HAProxy's place, with a configuration such as Serve writes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qwen_ray.commands.haproxy import METRICS, STATISTICS, in_front
from qwen_ray.commands.ports import free_ports
from qwen_ray.config import HttpSettings, Settings
from qwen_ray.core.errors import Overloaded
from qwen_ray.machine import haproxy
from qwen_ray.serving.errors import error_body

CONFIG = """global
    nbthread 1
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
frontend prometheus
    bind :{metrics}
    mode http
frontend stats
    bind *:{statistics}
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend ingress
backend ingress
    server one 127.0.0.1:{behind}
"""
LIMIT = 3

Answer = tuple[int, dict[str, str], str]  # status, headers, body

pytestmark = pytest.mark.skipif(haproxy() is None, reason="ray[serve] brings none here")


@pytest.fixture
def port(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """HAProxy's, and the one that it hands requests on to."""
    port, behind = free_ports(2)
    settings = Settings(http=HttpSettings(max_open_requests=LIMIT), cache_dir=tmp_path)
    with in_front(settings) as (_, environment):
        file = tmp_path / "haproxy.cfg"
        text = CONFIG.format(port=port, behind=behind, metrics=environment[METRICS], statistics=environment[STATISTICS])
        file.write_text(text)
        program = environment["RAY_SERVE_HAPROXY_BINARY_PATH"]
        for _ in range(2):  # Serve starts it anew for every change
            subprocess.run([program, "-db", "-f", str(file), "-c"], check=True, capture_output=True)
        changed = file.read_text()
        assert changed.count("stick-table") == 1
        assert f"bind 127.0.0.1:{environment[METRICS]}" in changed
        assert f"bind 127.0.0.1:{environment[STATISTICS]}" in changed
        process = subprocess.Popen([program, "-db", "-f", str(file)], stderr=subprocess.DEVNULL)
        yield port, behind
        process.kill()
        process.wait()


@contextmanager
def ingress(port: int) -> Iterator[threading.Event]:
    """Answers when it is told to."""
    may_answer = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            may_answer.wait(20)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield may_answer
    server.shutdown()
    thread.join()
    server.server_close()


async def ask(port: int, key: str | None, method: str = "POST", *, num: int = 1) -> list[Answer]:
    """`num` requests over one connection."""
    async with asyncio.timeout(20):
        reader, writer = await connect(port)
        answers: list[Answer] = []
        for _ in range(num):
            head = f"Authorization: Bearer {key}\r\n" if key else ""
            writer.write(f"{method} / HTTP/1.1\r\nHost: x\r\n{head}Content-Length: 0\r\n\r\n".encode())
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            body = await reader.readexactly(int(headers["content-length"]))
            answers.append((int(first.split()[1]), headers, body.decode()))
        writer.close()
        await writer.wait_closed()
    return answers


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    while True:
        try:
            return await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:  # it is starting
            await asyncio.sleep(0.05)


async def test_one_key_has_no_more_open_than_all_may_have(port: tuple[int, int]) -> None:
    front, behind = port
    with ingress(behind) as may_answer:
        heavy = [asyncio.create_task(ask(front, "heavy")) for _ in range(LIMIT + 5)]
        done, _ = await asyncio.wait(heavy, timeout=5, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 5:
            done, _ = await asyncio.wait(heavy, timeout=0.1)
        light = [asyncio.create_task(ask(front, name)) for name in ("light", None)]
        health = asyncio.create_task(ask(front, "heavy", "GET"))
        await asyncio.sleep(0.2)
        assert not any(task.done() for task in (*light, health))
        may_answer.set()
        answers = [answer for task in heavy for answer in await task]
        assert sorted(status for status, _, _ in answers) == [200] * LIMIT + [429] * 5
        assert [(await task)[0][0] for task in (*light, health)] == [200, 200, 200]
        _, headers, body = next(answer for answer in answers if answer[0] == 429)
        assert int(headers["retry-after"]) > 0
        assert headers["content-type"] == "application/json"
        error = json.loads(body)
        assert error == error_body(Overloaded(error["error"]["message"], retry_after=1.0))


async def test_what_has_been_answered_is_not_open(port: tuple[int, int]) -> None:
    front, behind = port
    with ingress(behind) as may_answer:
        may_answer.set()
        for _ in range(3):
            answers = await asyncio.gather(*(ask(front, "key", num=4) for _ in range(LIMIT)))
            assert {status for one in answers for status, _, _ in one} == {200}
