"""Channels: authentication, limits, order, ends; and that every message survives the way."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.cluster import channel as channel_module
from qwen_ray.cluster.channel import BlockingChannel, Channel, Listener, connect, listen
from qwen_ray.cluster.wire import ChannelClosed, Codec, FrameParser
from qwen_ray.core.request import GenerateRequest, SamplingParams, TokenDelta, TokenLogprobs
from qwen_ray.core.step import Chunk, NewSequence, StepBatch, StepResult

Message = StepBatch | TokenDelta | GenerateRequest
CODEC: Codec[Message] = Codec(StepBatch, TokenDelta, GenerateRequest)
SECRET = b"s" * 32

ids = st.lists(st.integers(0, 2**31), max_size=8).map(tuple)
floats = st.floats(allow_nan=False)
logprobs = st.builds(
    TokenLogprobs,
    token_id=st.integers(0, 2**20),
    logprob=floats,
    top=st.lists(st.tuples(st.integers(0, 2**20), floats), max_size=3).map(tuple),
)
sampling = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    logit_bias=st.dictionaries(st.integers(0, 2**20), st.floats(-100, 100), max_size=4),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    stop=st.lists(st.text(min_size=1), max_size=3).map(tuple),
    stop_token_ids=ids,
    logprobs=st.none() | st.integers(0, 20),
)
requests = st.builds(
    GenerateRequest,
    request_id=st.text(),
    prompt_token_ids=ids,
    sampling=sampling,
    seed=st.integers(0, 2**63 - 1),
    output_token_ids=ids,
    arrival=floats,
)
deltas = st.builds(
    TokenDelta,
    request_id=st.text(),
    token_ids=ids,
    logprobs=st.lists(logprobs, max_size=2).map(tuple),
    finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
    error=st.none() | st.text(),
)
batches = st.builds(
    StepBatch,
    step_id=st.integers(0, 2**60),
    chunks=st.lists(
        st.builds(
            Chunk,
            sequence_id=st.integers(0, 2**40),
            start=st.integers(0, 2**20),
            count=st.integers(1, 2**20),
            new_tokens=ids,
            new_blocks=ids,
        ),
        max_size=4,
    ).map(tuple),
    new=st.lists(
        st.builds(
            NewSequence,
            sequence_id=st.integers(0, 2**40),
            token_ids=ids,
            num_prompt_tokens=st.integers(0, 8),
            sampling=sampling,
            seed=st.integers(0, 2**63 - 1),
            stop_token_ids=ids,
        ),
        max_size=2,
    ).map(tuple),
    dropped=ids,
)
messages = st.lists(st.one_of(batches, deltas, requests), min_size=1, max_size=4)


def delta(number: int, size: int = 1) -> TokenDelta:
    return TokenDelta(request_id=str(number), token_ids=tuple([number] * size))


@pytest.fixture
async def echo() -> AsyncIterator[Listener[Message]]:
    async def handler(channel: Channel[Message]) -> None:
        async for message in channel:
            channel.send(message)
            await channel.drain()

    listener = await listen("127.0.0.1", SECRET, handler, CODEC)
    yield listener
    await listener.close()


@settings(max_examples=60, deadline=None)
@given(messages, st.data())
def test_messages_survive_any_cut_of_the_stream(sent: list[Message], data: st.DataObject) -> None:
    stream = b"".join(map(CODEC.encode, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    parser = FrameParser(CODEC.max_message_bytes)
    received = [
        CODEC.decode(payload)
        for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)
        for payload in parser.feed(stream[start:stop])
    ]
    assert received == sent


async def test_many_messages_come_back_in_order(echo: Listener[Message]) -> None:
    channel = await connect(echo.address, SECRET, CODEC)

    async def send() -> None:
        for number in range(500):
            channel.send(delta(number, size=1 + number * 7 % 2000))
            await channel.drain()

    task = asyncio.create_task(send())
    received = [message async for message, _ in _zip(channel, 500)]
    await task
    channel.close()
    assert [m.request_id for m in received if isinstance(m, TokenDelta)] == [str(n) for n in range(500)]


async def _zip(channel: Channel[Message], count: int) -> AsyncIterator[tuple[Message, int]]:
    for number in range(count):
        yield await anext(channel), number


def test_uvloop_carries_channels_too() -> None:
    """Ray Serve runs replicas on uvloop, whose transports are not asyncio's."""

    async def handler(channel: Channel[Message]) -> None:
        async for message in channel:
            channel.send(message)

    async def talk() -> Message:
        listener = await listen("127.0.0.1", SECRET, handler, CODEC)
        with pytest.raises(ChannelClosed):
            await connect(listener.address, b"x" * 32, CODEC)
        channel = await connect(listener.address, SECRET, CODEC)
        channel.send(delta(1, size=100_000))
        received = await anext(channel)
        channel.close()
        await channel.wait_closed()
        await listener.close()
        return received

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(talk()) == delta(1, size=100_000)


async def test_wrong_secret_is_refused(echo: Listener[Message]) -> None:
    with pytest.raises(ChannelClosed):
        await connect(echo.address, b"x" * 32, CODEC)
    with pytest.raises(ChannelClosed):
        await asyncio.to_thread(BlockingChannel.connect, echo.address, b"x" * 32, CODEC)


async def test_listener_must_prove_itself_too() -> None:
    def impostor(server: socket.socket) -> None:
        peer, _ = server.accept()
        with peer:
            peer.sendall(b"qwenray1" + bytes(32))
            while peer.recv(1000):
                peer.sendall(bytes(32))

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=impostor, args=(server,))
        thread.start()
        with pytest.raises(ChannelClosed, match="listening end does not hold the secret"):
            await connect(f"127.0.0.1:{server.getsockname()[1]}", SECRET, CODEC)
        await asyncio.to_thread(thread.join)


async def test_nothing_is_decoded_before_the_proof(echo: Listener[Message]) -> None:
    reader, writer = await asyncio.open_connection(*_host_port(echo.address))
    await reader.readexactly(40)
    writer.write(bytes(64) + CODEC.encode(delta(1)))
    with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
        await reader.readexactly(1)
    writer.close()


async def test_silent_stranger_is_dropped(echo: Listener[Message], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "HANDSHAKE_SECONDS", 0.05)
    reader, writer = await asyncio.open_connection(*_host_port(echo.address))
    assert len(await reader.read()) == 40  # the greeting, then the end
    writer.close()


async def test_nobody_there_is_channel_closed() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        with pytest.raises(ChannelClosed, match=address):
            await connect(address, SECRET, CODEC)


async def test_oversize_frames_are_refused_at_both_ends(echo: Listener[Message]) -> None:
    small = Codec(StepBatch, TokenDelta, GenerateRequest, max_message_bytes=1000)
    with pytest.raises(ValueError, match="limit is 1000"):
        small.encode(delta(1, size=2000))
    channel = await connect(echo.address, SECRET, small)
    channel.write(CODEC.encode(delta(1, size=2000)))  # comes back larger than this end takes
    assert [message async for message in channel] == []
    assert "limit is 1000" in channel.reason
    with pytest.raises(ChannelClosed, match="limit is 1000"):
        channel.send(delta(2))


@pytest.mark.parametrize("payload", [b"", b"\x09\x80", b"\x01\xc0", b"\x01\x80", b"\x02" + bytes(30)])
async def test_garbage_ends_the_channel(echo: Listener[Message], payload: bytes) -> None:
    channel = await connect(echo.address, SECRET, CODEC)
    channel.write(len(payload).to_bytes(4, "big") + payload)
    assert [message async for message in channel] == []


async def test_reader_that_never_reads_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "MAX_UNSENT_BYTES", 2**20)
    monkeypatch.setattr(channel_module, "MAX_UNREAD_BYTES", 2**20)
    reason: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def flood(channel: Channel[Message]) -> None:
        message = delta(70_000, size=100_000)
        try:
            while True:
                channel.send(message)
                await asyncio.sleep(0)
        except ChannelClosed as error:
            reason.set_result(str(error))

    listener = await listen("127.0.0.1", SECRET, flood, CODEC)
    channel = await connect(listener.address, SECRET, CODEC)
    assert "does not read" in await reason
    assert len([message async for message in channel]) >= 1
    await listener.close()


async def test_slow_reader_gets_everything_by_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "MAX_UNREAD_BYTES", 2**16)

    async def flood(channel: Channel[Message]) -> None:
        for number in range(40):
            channel.send(delta(number, size=50_000))
            await channel.drain()

    listener = await listen("127.0.0.1", SECRET, flood, CODEC)
    channel = await connect(listener.address, SECRET, CODEC)
    received: list[str] = []
    async for message in channel:
        received.append(message.request_id if isinstance(message, TokenDelta) else "")
        await asyncio.sleep(0.001)
    await listener.close()
    assert received == [str(number) for number in range(40)]


async def test_end_of_one_side_ends_the_other(echo: Listener[Message]) -> None:
    channel = await connect(echo.address, SECRET, CODEC)
    await echo.close()
    assert [message async for message in channel] == []
    assert channel.is_closed
    with pytest.raises(ChannelClosed):
        channel.send(delta(1))
    channel.close()


async def test_blocking_end_speaks_with_the_async_one(echo: Listener[Message]) -> None:
    def talk() -> list[Message]:
        channel = BlockingChannel.connect(echo.address, SECRET, CODEC)
        for number in range(50):
            channel.send(delta(number, size=3000))
        received = [channel.receive() for _ in range(50)]
        channel.close()
        with pytest.raises(ChannelClosed):
            channel.receive()
        return received

    assert await asyncio.to_thread(talk) == [delta(number, size=3000) for number in range(50)]


async def test_closing_wakes_a_blocked_thread(echo: Listener[Message]) -> None:
    channel = await asyncio.to_thread(BlockingChannel.connect, echo.address, SECRET, CODEC)
    ended = threading.Event()
    thread = threading.Thread(target=_until_closed, args=(channel.receive, ended))
    thread.start()
    channel.close()
    assert await asyncio.to_thread(ended.wait, 5)
    thread.join()


def _until_closed(receive: Callable[[], Message], ended: threading.Event) -> None:
    with pytest.raises(ChannelClosed):
        receive()
    ended.set()


async def test_step_result_with_a_wrong_tag_is_not_taken(echo: Listener[Message]) -> None:
    other: Codec[StepResult] = Codec(StepResult)
    channel = await connect(echo.address, SECRET, other)
    channel.send(StepResult(step_id=1))  # tag 0 is StepBatch over there, which must have chunks
    assert [message async for message in channel] == []


def _host_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
