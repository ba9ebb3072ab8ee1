"""The benchmark's client: tokens counted by chunk, whatever way the server cuts its stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.peers.client import Answer, Endpoint, RequestFailed, complete, read_events
from benchmarks.peers.completion_server import serve
from qwen_ray.commands.ports import free_ports


def _stream(*events: object) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def _ids(*ids: int) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": "", "token_ids": list(ids)}]}


def _used(count: int) -> dict[str, object]:
    return {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": count}}


@settings(max_examples=25)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.lists(st.integers(1, 40), min_size=1))
def test_tokens_are_counted_however_the_stream_is_cut(counts: list[int], sizes: list[int]) -> None:
    data = _stream(*(_ids(*range(n)) for n in counts), _used(sum(counts)))
    pieces: list[tuple[float, bytes]] = []
    while data:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append((float(len(pieces)), data[:size]))
        data = data[size:]
    read = list(read_events(pieces, sum(counts)))
    assert [count for _, count in read] == counts
    assert [at for at, _ in read] == sorted(at for at, _ in read)


def test_an_event_has_the_time_of_the_piece_that_ended_it() -> None:
    data = _stream(_ids(7), _used(1))
    assert list(read_events([(1.0, data[:10]), (2.0, data[10:])], 1)) == [(2.0, 1)]


def test_llama_cpp_gives_a_running_count() -> None:
    events = [{"choices": [{"text": "x"}], "timings": {"predicted_n": n}} for n in (1, 3, 3, 4)]
    read = list(read_events([(0.0, _stream(*events, _used(4)))], 4))
    assert [count for _, count in read] == [1, 2, 1]


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (_stream(_ids(1), _used(1)), "2 tokens were asked for, 1 came, and usage says 1"),
        (_stream(_ids(1, 2), _used(3)), "usage says 3"),
        (_stream(_ids(1, 2)), "usage says None"),
        (_stream(_ids(1, 2), _used(2)).removesuffix(b"data: [DONE]\n\n"), "broke off"),
        (_stream({"error": {"message": "out of memory"}}), "out of memory"),
    ],
)
def test_an_answer_that_is_not_whole_is_refused(stream: bytes, message: str) -> None:
    with pytest.raises(RequestFailed, match=message):
        list(read_events([(0.0, stream)], 2))


def test_a_chunk_of_several_tokens_shares_its_gap() -> None:
    answer = Answer(started=1.0, arrivals=((2.0, 1), (3.0, 1), (5.0, 2)))
    assert answer.ttft == 1.0
    assert answer.chunk_gaps == [1.0, 2.0]
    assert answer.token_gaps == [1.0, 1.0, 1.0]
    assert answer.tokens_per_second == 1.0
    assert answer.num_tokens == 4


class _Counting:
    async def stream(self, prompt: list[int], num_tokens: int) -> AsyncIterator[list[int]]:
        yield prompt[:1]
        await asyncio.sleep(0)
        if num_tokens > 1:
            yield [0] * (num_tokens - 1)


async def test_the_smallest_server_answers_the_client() -> None:
    (port,) = free_ports(1)
    serving = asyncio.create_task(serve(_Counting(), port))
    endpoint = Endpoint(port=port, model="any", extra_body={})
    try:
        with pytest.raises(RequestFailed):
            await complete(Endpoint(port=free_ports(1)[0], model="any", extra_body={}), [1], 1)
        while not serving.done():
            try:
                answer = await complete(endpoint, [5, 6], 4)
                break
            except RequestFailed:
                await asyncio.sleep(0.01)
        assert [count for _, count in answer.arrivals] == [1, 3]
    finally:
        serving.cancel()


async def test_a_refusal_says_why() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 7\r\n\r\nloading")
        await writer.drain()
        writer.close()

    (port,) = free_ports(1)
    async with await asyncio.start_server(refuse, "127.0.0.1", port):
        with pytest.raises(RequestFailed, match=r"503 .*loading"):
            await complete(Endpoint(port=port, model="any", extra_body={}), [1], 1)


async def test_a_chunked_answer_is_read() -> None:
    data = _stream(_ids(1), _ids(2, 3), _used(3))
    cut = len(data) // 2

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for part in (data[:cut], data[cut:], b""):
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        await writer.drain()
        writer.close()

    (port,) = free_ports(1)
    async with await asyncio.start_server(answer, "127.0.0.1", port):
        got = await complete(Endpoint(port=port, model="any", extra_body={}), [1], 3)
    assert got.num_tokens == 3
