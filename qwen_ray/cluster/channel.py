"""Typed messages between two processes over TCP, authenticated before anything is decoded.

Knows connections, limits and their ends; not what the messages mean. Both ends prove that they hold the listener's
secret (HMAC-SHA256 over fresh nonces, see `wire.py`). Frames are neither encrypted nor signed: the network is trusted
as far as Ray's own traffic on it is; the secret keeps strangers and mix-ups out.

`Channel` is the asyncio end, `BlockingChannel` the end for a thread that does nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar, cast

from qwen_ray.cluster.wire import ChannelClosed, Codec, FrameParser, Handshake, accepting, connecting

logger = logging.getLogger(__name__)

M = TypeVar("M")

MAX_UNSENT_BYTES = 64 * 2**20  # a peer that does not read is cut off here
MAX_UNREAD_BYTES = 8 * 2**20  # messages nobody has taken yet: reading pauses here
HANDSHAKE_SECONDS = 10.0
CLOSE_SECONDS = 2.0  # for a closing channel to send what is left


def _tune(sock: socket.socket) -> None:
    """No delay for small frames; a peer whose machine vanished is noticed in 10 s, or 20 s after what it never got."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 20_000))
    for name, value in options:
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Channel(asyncio.Protocol, Generic[M]):
    """One end of an open connection: `send`, `drain`, `async for message in channel`, `close`.

    Iteration ends when the connection does, for whatever cause; `reason` says which. One task may iterate at a time.
    """

    def __init__(self, codec: Codec[M], handshake: Handshake) -> None:
        self.codec = codec
        self.reason = ""
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._parser = FrameParser(codec.max_message_bytes)
        self._handshake: Handshake | None = handshake
        self._handshake_bytes = bytearray()
        self._expected = 0
        self._transport: asyncio.Transport | None = None
        self._inbox: deque[tuple[M, int]] = deque()
        self._unread_bytes = 0
        self._is_reading_paused = False
        self._is_writable = asyncio.Event()
        self._is_writable.set()
        self._arrived = asyncio.Event()
        self._lost = asyncio.Event()
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def send(self, message: M) -> None:
        """Puts `message` into the transport's buffer. Raises ChannelClosed, ValueError if it is over the limit."""
        self.write(self.codec.encode(message))

    def write(self, frame: bytes) -> None:
        """`send` for a frame that `codec.encode` made: encode once, write to many."""
        transport = self._transport
        if self._is_closed or transport is None:
            raise ChannelClosed(self.reason or "not open")
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._end(f"the other end does not read: {MAX_UNSENT_BYTES} bytes unsent", abort=True)
            raise ChannelClosed(self.reason)
        transport.write(frame)

    async def drain(self) -> None:
        """Waits until the other end has read enough for more to be sent. Raises ChannelClosed."""
        await self._is_writable.wait()
        if self._is_closed:
            raise ChannelClosed(self.reason)

    def __aiter__(self) -> Channel[M]:
        return self

    async def __anext__(self) -> M:
        while not self._inbox:
            if self._is_closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        message, size = self._inbox.popleft()
        self._unread_bytes -= size
        if self._is_reading_paused and self._unread_bytes < MAX_UNREAD_BYTES // 2 and self._transport:
            self._is_reading_paused = False
            self._transport.resume_reading()
        return message

    def close(self) -> None:
        """Sends what is in the buffer (2 s at most), then closes. Safe to call twice."""
        self._end("closed on this side")

    async def wait_closed(self) -> None:
        """After `close`: until the socket is really gone."""
        if self._transport is not None:
            await self._lost.wait()

    def _end(self, reason: str, *, abort: bool = False) -> None:
        transport = self._transport
        if transport is not None and not self._is_closed:
            if abort:
                transport.abort()
            else:
                transport.close()
                asyncio.get_running_loop().call_later(CLOSE_SECONDS, transport.abort)
        if not self._is_closed:
            self._is_closed = True
            self.reason = reason
        self._is_writable.set()
        self._arrived.set()
        if not self.opened.done():
            self.opened.set_exception(ChannelClosed(self.reason))
            self.opened.exception()  # a listener's side has nobody who awaits it

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by inheritance
        _tune(transport.get_extra_info("socket"))
        self._advance_handshake(b"")

    def data_received(self, data: bytes) -> None:
        if self._is_closed:
            return
        try:
            if self._handshake is not None:
                data = self._advance_handshake(data)
            for payload in self._parser.feed(data) if data else ():
                self._inbox.append((self.codec.decode(payload), len(payload)))
                self._unread_bytes += len(payload)
        except ChannelClosed as error:
            logger.warning("channel closed: %s", error)
            self._end(str(error), abort=True)
            return
        if self._unread_bytes > MAX_UNREAD_BYTES and not self._is_reading_paused and self._transport:
            self._is_reading_paused = True
            self._transport.pause_reading()
        self._arrived.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"connection lost: {exc}" if exc else "closed by the other end", abort=True)
        self._lost.set()

    def pause_writing(self) -> None:
        self._is_writable.clear()

    def resume_writing(self) -> None:
        self._is_writable.set()

    def _advance_handshake(self, data: bytes) -> bytes:
        """Takes the handshake as far as the bytes go; returns those that are beyond it."""
        handshake, transport, buffer = self._handshake, self._transport, self._handshake_bytes
        assert handshake is not None
        assert transport is not None
        buffer += data
        while len(buffer) >= self._expected:
            answer = bytes(buffer[: self._expected])
            del buffer[: self._expected]
            try:
                output, self._expected = handshake.send(answer) if self._expected else next(handshake)
            except StopIteration as stop:
                transport.write(stop.value)
                self._handshake = None
                if not self.opened.done():
                    self.opened.set_result(None)
                return bytes(buffer)
            transport.write(output)
        return b""


class Listener(Generic[M]):
    """Accepts channels; `address` is what `connect` takes. `handler(channel)` runs as a task for each of them; the
    channel is closed when it returns."""

    def __init__(self, secret: bytes, handler: Callable[[Channel[M]], Awaitable[None]], codec: Codec[M]) -> None:
        self.address = ""
        self._secret = secret
        self._handler = handler
        self._codec = codec
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, host, 0)
        port = self._server.sockets[0].getsockname()[1]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def close(self) -> None:
        """Stops accepting, cancels the handlers, closes their channels."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self) -> Channel[M]:
        channel = Channel(self._codec, accepting(self._secret))
        task = asyncio.get_running_loop().create_task(self._serve(channel))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return channel

    async def _serve(self, channel: Channel[M]) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                await channel.opened
            await self._handler(channel)
        except ChannelClosed as error:
            logger.info("channel ended: %s", error)
        except TimeoutError:
            logger.warning("channel refused: no handshake within %s s", HANDSHAKE_SECONDS)
        except Exception:
            logger.exception("channel handler failed")
        finally:
            channel.close()
            await channel.wait_closed()


async def listen(
    host: str, secret: bytes, handler: Callable[[Channel[M]], Awaitable[None]], codec: Codec[M]
) -> Listener[M]:
    """A listener on a free port of `host`, an address other nodes can reach. `secret` is random, 32 bytes."""
    listener = Listener(secret, handler, codec)
    await listener.start(host)
    return listener


async def connect(address: str, secret: bytes, codec: Codec[M], *, seconds: float = HANDSHAKE_SECONDS) -> Channel[M]:
    """An open, authenticated channel. Raises ChannelClosed: refused, unreachable, wrong secret, or out of time."""
    host, port = _split(address)
    try:
        async with asyncio.timeout(seconds):
            _, channel = await asyncio.get_running_loop().create_connection(
                lambda: Channel(codec, connecting(secret)), host, port
            )
            try:
                await channel.opened
            except BaseException:
                channel.close()
                await channel.wait_closed()
                raise
    except ChannelClosed as error:
        raise ChannelClosed(f"{address}: {error}") from error
    except (OSError, TimeoutError) as error:
        raise ChannelClosed(f"{address}: {error or f'no answer within {seconds} s'}") from error
    return channel


class BlockingChannel(Generic[M]):
    """The connecting end for a thread: `receive` and `send` block; `close` from another thread wakes `receive`."""

    def __init__(self, sock: socket.socket, codec: Codec[M]) -> None:
        self.codec = codec
        self._sock = sock
        self._parser = FrameParser(codec.max_message_bytes)
        self._payloads: deque[bytes] = deque()

    @classmethod
    def connect(
        cls, address: str, secret: bytes, codec: Codec[M], *, seconds: float = HANDSHAKE_SECONDS
    ) -> BlockingChannel[M]:
        """As the function of that name. Raises ChannelClosed."""
        try:
            sock = socket.create_connection(_split(address), timeout=seconds)
        except OSError as error:
            raise ChannelClosed(f"{address}: {error}") from error
        try:
            _tune(sock)
            handshake = connecting(secret)
            output, expected = next(handshake)
            while True:
                sock.sendall(output)
                output, expected = handshake.send(_receive_exactly(sock, expected))
        except StopIteration:
            sock.settimeout(None)
            return cls(sock, codec)
        except OSError as error:
            sock.close()
            raise ChannelClosed(f"{address}: {error}") from error

    def receive(self) -> M:
        """The next message. Raises ChannelClosed at the end of the stream."""
        while not self._payloads:
            try:
                data = self._sock.recv(256 * 1024)
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if not data:
                raise ChannelClosed("closed by the other end")
            self._payloads.extend(self._parser.feed(data))
        return self.codec.decode(self._payloads.popleft())

    def send(self, message: M) -> None:
        """Raises ChannelClosed, ValueError if the message is over the limit."""
        try:
            self._sock.sendall(self.codec.encode(message))
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def close(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            logger.debug("channel was closed already")
        self._sock.close()


def _receive_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise ChannelClosed("closed by the other end during the handshake: wrong secret?")
        data += part
    return data


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
