"""A TCP connection between two ranks that carries CPU tensors, in order; and a tensor group made of such links.

Why not gloo: nothing ends a gloo receive that waits for a live peer, and a group must come down at once when any rank
dies. A socket is shut down from any thread.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch._C._distributed_c10d import Store

TOKEN_BYTES = 16


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
        self._socket.sendall(_bytes_of(x.contiguous()))

    def receive(self, x: torch.Tensor) -> torch.Tensor:
        """Fill contiguous x."""
        left = _bytes_of(x)
        while left:
            count = self._socket.recv_into(left)
            if count == 0:
                raise ConnectionResetError("the peer has closed the connection")
            left = left[count:]
        return x

    def abort(self) -> None:
        """End both directions, whoever waits. From any thread."""
        with contextlib.suppress(OSError):  # the peer was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


class Listener:
    """The end that waits for its peer; `store` tells the peer where."""

    def __init__(self, store: Store, name: str, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family, backlog=1)
        self._token = secrets.token_bytes(TOKEN_BYTES)
        store.set(name, f"{address} {self._socket.getsockname()[1]} {self._token.hex()}")

    def accept(self, timeout: float) -> Link:
        """Raises TimeoutError."""
        with self._socket:
            self._socket.settimeout(timeout)
            while True:
                connection, _ = self._socket.accept()
                connection.settimeout(timeout)
                if connection.recv(TOKEN_BYTES, socket.MSG_WAITALL) == self._token:
                    return Link(connection, timeout)
                connection.close()


def connect(store: Store, name: str, timeout: float) -> Link:
    """The end that goes to its peer's `Listener` of the same name."""
    address, port, token = store.get(name).decode().split()
    connection = socket.create_connection((address, int(port)), timeout)
    connection.sendall(bytes.fromhex(token))
    return Link(connection, timeout)


class Star:
    """A TensorGroup of CPU ranks that share no memory: rank 0 has a link to each other one, adds up and hands out."""

    def __init__(self, rank: int, size: int, links: Sequence[Link]) -> None:
        """`links`: on rank 0 to the ranks 1, 2, …; on the others the one to rank 0."""
        self.size = size
        self._rank = rank
        self._links = links

    @classmethod
    def join(cls, store: Store, rank: int, size: int, address: str, timeout: float) -> Star:
        if rank != 0:
            return cls(rank, size, [connect(store, f"star{rank}", timeout)])
        listeners = [Listener(store, f"star{peer}", address) for peer in range(1, size)]
        return cls(rank, size, [listener.accept(timeout) for listener in listeners])

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        if self._rank != 0:
            self._links[0].send(x)
            return self._links[0].receive(x)
        total = x.float()
        for link in self._links:
            total += link.receive(torch.empty_like(x))
        total = total.to(x.dtype)
        for link in self._links:
            link.send(total)
        return total

    def gather(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        if self._rank != 0:
            self._links[0].send(x)
            return None
        others = [x.new_empty(x.shape[0], size) for size in sizes[1:]]
        parts = [link.receive(part) for link, part in zip(self._links, others, strict=True)]
        return torch.cat([x, *parts], dim=-1)

    def abort(self) -> None:
        for link in self._links:
            link.abort()

    def close(self) -> None:
        for link in self._links:
            link.close()


def _bytes_of(x: torch.Tensor) -> memoryview:
    return memoryview(cast(Any, x.view(-1).view(torch.uint8).numpy()))
