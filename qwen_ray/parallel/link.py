"""A TCP connection between two ranks that carries CPU tensors, in order.

Why not gloo: nothing ends a gloo receive that waits for a live peer, and a group must come down at once when any rank
dies. A socket is shut down from any thread.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
from collections.abc import Sequence

import torch

from qwen_ray.parallel.board import Board
from qwen_ray.parallel.collectives import bytes_of

CONNECT_SECONDS = 10.0
TOKEN_BYTES = 16
GOODBYE = b"."


class Link:
    """One end. The two ends must send and receive tensors of the same sizes; there are no headers.

    Raises OSError when the peer dies, hangs or aborts.
    """

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection

    def send(self, x: torch.Tensor) -> None:
        """Returns as soon as the system has taken it."""
        self._socket.sendall(bytes_of(x.contiguous()))

    def receive(self, x: torch.Tensor) -> torch.Tensor:
        """Fill contiguous x."""
        left = bytes_of(x)
        while left:
            count = self._socket.recv_into(left)
            if count == 0:
                raise ConnectionResetError("the peer has closed the connection")
            left = left[count:]
        return x

    def say_goodbye(self) -> None:
        """To a peer that is in `wait_for_loss`: the end that comes is no loss."""
        with contextlib.suppress(OSError):
            self._socket.sendall(GOODBYE)

    def abort(self) -> None:
        """End both directions, whoever waits. From any thread."""
        with contextlib.suppress(OSError):  # the peer was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def has_said_goodbye(self) -> bool:
        """What has come, if something has: GOODBYE, or nothing but the end."""
        try:
            return self._socket.recv(1) == GOODBYE
        except OSError:
            return False


def wait_for_loss(links: Sequence[Link]) -> bool:
    """Listen to links on which nothing is sent, until one ends without a goodbye. False: all said goodbye."""
    poll = select.poll()
    silent = {link.fileno(): link for link in links}
    for descriptor in silent:
        poll.register(descriptor, select.POLLIN)
    while silent:
        for descriptor, _ in poll.poll():
            if not silent[descriptor].has_said_goodbye():
                return True
            poll.unregister(descriptor)
            del silent[descriptor]
    return False


class Listener:
    """The end that waits for its peer; `board` tells the peer where."""

    def __init__(self, board: Board, name: str, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family, backlog=1)
        self._socket.setblocking(False)
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._wait = board.wait
        board.set(name, f"{address} {self._socket.getsockname()[1]} {self._token.hex()}")

    def accept(self, timeout: float) -> Link:
        """The link, whose operations `timeout` bounds. Raises what `Wait.pause` raises."""
        with self._socket:
            while True:
                try:
                    connection, _ = self._socket.accept()
                except BlockingIOError:
                    self._wait.pause()
                    continue
                connection.settimeout(CONNECT_SECONDS)
                if connection.recv(TOKEN_BYTES, socket.MSG_WAITALL) == self._token:
                    return Link(connection, timeout)
                connection.close()

    def close(self) -> None:
        self._socket.close()


def connect(board: Board, name: str, timeout: float) -> Link:
    """The end that goes to its peer's `Listener` of the same name."""
    address, port, token = board.get(name).decode().split()
    connection = socket.create_connection((address, int(port)), CONNECT_SECONDS)
    connection.sendall(bytes.fromhex(token))
    return Link(connection, timeout)
