"""Messages as bytes, and two strangers' proof to each other: what a channel is made of, without any socket.

    frame = length (4 bytes, big endian, of what follows) · tag (1 byte: which message type) · msgpack

Knows bytes, secrets and limits; not what the messages mean, nor how bytes travel.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections.abc import Generator
from typing import Any, Generic, TypeVar

import msgspec

M = TypeVar("M")

MAX_MESSAGE_BYTES = 64 * 2**20  # prompt logprobs of 128k tokens with 20 alternatives are 40 MiB

_HEADER = struct.Struct(">IB")
_LENGTH = struct.Struct(">I")
_GREETING = b"qwenray1"
_NONCE_BYTES = 32
_PROOF_BYTES = 32


class ChannelClosed(ConnectionError):
    """The other end is gone, or was refused. Whoever owns the channel turns it into what it means to a request."""


class Codec(Generic[M]):
    """The message types that one kind of channel carries, the same tuple in the same order at both ends."""

    def __init__(self, *types: type[M], max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.max_message_bytes = max_message_bytes
        self._tags: dict[type[Any], int] = {message_type: tag for tag, message_type in enumerate(types)}
        self._decoders = [msgspec.msgpack.Decoder(message_type) for message_type in types]
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, message: M) -> bytes:
        """One whole frame, for `write` on any number of channels. Raises ValueError if it is over the limit."""
        frame = bytearray(_HEADER.size)
        self._encoder.encode_into(message, frame, _HEADER.size)
        if len(frame) - _LENGTH.size > self.max_message_bytes:
            raise ValueError(f"{type(message).__name__} of {len(frame)} bytes; the limit is {self.max_message_bytes}")
        _HEADER.pack_into(frame, 0, len(frame) - _LENGTH.size, self._tags[type(message)])
        return bytes(frame)

    def decode(self, payload: bytes) -> M:
        """From tag and msgpack. Raises ChannelClosed when it is none of the types: there is no going on after it."""
        if not payload or payload[0] >= len(self._decoders):
            raise ChannelClosed(f"a message with unknown tag {payload[:1].hex() or 'none'}")
        try:
            return self._decoders[payload[0]].decode(memoryview(payload)[1:])
        except Exception as error:  # msgspec's own, or whatever a dataclass's __post_init__ raises
            raise ChannelClosed(f"a message that cannot be decoded: {error}") from error


class FrameParser:
    """Cuts a byte stream into payloads; keeps at most one incomplete frame."""

    def __init__(self, max_message_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Payloads completed by `data`. Raises ChannelClosed as soon as a header announces too much."""
        buffer = self._buffer
        buffer += data
        payloads: list[bytes] = []
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > self._max_message_bytes:
                raise ChannelClosed(f"a message of {length} bytes; the limit is {self._max_message_bytes}")
            end = start + _LENGTH.size + length
            if len(buffer) < end:
                break
            payloads.append(bytes(memoryview(buffer)[start + _LENGTH.size : end]))
            start = end
        del buffer[:start]
        return payloads


# A handshake yields (bytes to send, number of bytes to wait for), is sent what came, and returns the last bytes to
# send. Both ends prove themselves; the roles in the proofs keep one from being played back as the other.
Handshake = Generator[tuple[bytes, int], bytes, bytes]


def _proof(secret: bytes, role: bytes, nonces: bytes) -> bytes:
    return hmac.digest(secret, _GREETING + role + nonces, "sha256")


def accepting(secret: bytes) -> Handshake:
    ours = secrets.token_bytes(_NONCE_BYTES)
    answer = yield _GREETING + ours, _NONCE_BYTES + _PROOF_BYTES
    nonces = ours + answer[:_NONCE_BYTES]
    if not hmac.compare_digest(answer[_NONCE_BYTES:], _proof(secret, b"connects", nonces)):
        raise ChannelClosed("the connecting end does not hold the secret")
    return _proof(secret, b"listens", nonces)


def connecting(secret: bytes) -> Handshake:
    greeting = yield b"", len(_GREETING) + _NONCE_BYTES
    if not greeting.startswith(_GREETING):
        raise ChannelClosed("what listens there is no qwen-ray channel")
    ours = secrets.token_bytes(_NONCE_BYTES)
    nonces = greeting[len(_GREETING) :] + ours
    answer = yield ours + _proof(secret, b"connects", nonces), _PROOF_BYTES
    if not hmac.compare_digest(answer, _proof(secret, b"listens", nonces)):
        raise ChannelClosed("the listening end does not hold the secret")
    return b""
