"""The ranks of one replica getting to know each other, seen from one of them.

Knows how ranks find each other and which means of talking they have. What becomes of the connections is `groups.py`'s.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from qwen_ray.core.plan import Rendezvous, Shard
from qwen_ray.parallel.board import Board, Wait
from qwen_ray.parallel.collectives import Alone, Connection, Nccl, NcclPipe, Pipe, TensorGroup
from qwen_ray.parallel.link import Listener, connect
from qwen_ray.parallel.mesh import Mesh
from qwen_ray.parallel.shared_memory import SharedMemory

CONNECT_SECONDS = 1.0  # of one attempt to reach the store


@dataclass(frozen=True, slots=True, kw_only=True)
class Connections:
    """One rank's way to each of its peers. `stage` None: the tensor ranks are all ranks of the stage."""

    tensor: TensorGroup
    stage: TensorGroup | None
    previous: Pipe | None
    following: Pipe | None
    store: Store | None  # NCCL comes back to it; and rank 0 serves it to the others

    @property
    def parts(self) -> tuple[TensorGroup | Pipe, ...]:
        ways = (self.tensor, self.stage, self.previous, self.following)
        return tuple(part for part in ways if part is not None)


def meet(shard: Shard, rendezvous: Rendezvous, device: torch.device, wait: Wait, *, timeout: float) -> Connections:
    """Every rank of the plan has to call this. `timeout` in seconds bounds each later operation.

    Raises OSError or torch's DistError; then nothing stays open.
    """
    board = _open_board(shard, rendezvous, wait, timeout)
    address = local_address(*_host_port(rendezvous.address))
    with contextlib.ExitStack() as opened:
        meeting = _Meeting(shard, board, address, device, timeout, opened)
        previous, following = meeting.pipes()
        tensor = meeting.tensor_group()
        stage = meeting.stage_group() if shard.dp_size > 1 else None
        meeting.end()
        opened.pop_all()
    store = board.store if device.type == "cuda" else None
    return Connections(tensor=tensor, stage=stage, previous=previous, following=following, store=store)


class _Meeting:
    def __init__(
        self,
        shard: Shard,
        board: Board,
        address: str,
        device: torch.device,
        timeout: float,
        opened: contextlib.ExitStack,
    ) -> None:
        """`address`: where peers can reach this rank. `opened` closes what was made, should the meeting fail."""
        self._shard = shard
        self._board = board
        self._address = address
        self._device = device
        self._timeout = timeout
        self._opened = opened

    def tensor_group(self) -> TensorGroup:
        """Of this rank's dp rank."""
        shard = self._shard
        return self._group(f"stage{shard.stage}dp{shard.dp_rank}", shard.tp_rank, shard.tp_size)

    def stage_group(self) -> TensorGroup:
        """Of all dp ranks."""
        return self._group(f"stage{self._shard.stage}", self._shard.stage_rank, self._shard.stage_size)

    def _group(self, name: str, rank: int, size: int) -> TensorGroup:
        """NCCL between CUDA devices; on CPU shared memory, or TCP where there is none to share."""
        if size == 1:
            return Alone()
        board = self._board.part(name)
        if self._device.type == "cuda":
            group: TensorGroup = Nccl(self._nccl(board.store, rank, size))
        else:
            shared = SharedMemory.join(board, rank, size, timeout=self._timeout)
            group = shared or Mesh.join(board, rank, size, self._address, self._timeout)
        self._opened.callback(group.close)
        return group

    def pipes(self) -> tuple[Pipe | None, Pipe | None]:
        """From the previous stage, and to the next."""
        receives, sends = not self._shard.is_first, not self._shard.is_last
        incoming, outgoing = f"to{self._shard.rank}", f"to{self._shard.next_rank}"
        previous: Pipe | None = None
        following: Pipe | None = None
        if self._device.type == "cuda":
            # Stage by stage, so that both ends of a pair are made at the same time.
            if receives:
                previous = self._keep(NcclPipe(self._nccl(self._board.part(incoming).store, 1, 2)))
            if sends:
                following = self._keep(NcclPipe(self._nccl(self._board.part(outgoing).store, 0, 2)))
            return previous, following
        listener = Listener(self._board, incoming, self._address) if receives else None
        if listener is not None:
            self._opened.callback(listener.close)
        if sends:
            following = self._keep(connect(self._board, outgoing, self._timeout))
        if listener is not None:
            previous = self._keep(listener.accept(self._timeout))
        return previous, following

    def _keep(self, pipe: Pipe) -> Pipe:
        self._opened.callback(pipe.close)
        return pipe

    def end(self) -> None:
        """Rank 0 stays until all others need its store no more: it may be closed right after."""
        self._board.set(f"joined{self._shard.rank}", "yes")
        if self._shard.rank == 0:
            for rank in range(self._shard.world_size):
                self._board.get(f"joined{rank}")

    def _nccl(self, store: Store, rank: int, size: int) -> Connection:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self._timeout)
        return cast(Connection, dist.ProcessGroupNCCL(store, rank, size, options))


def _host_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _open_board(shard: Shard, rendezvous: Rendezvous, wait: Wait, timeout: float) -> Board:
    """The board of this very meeting: at its address, that of one before it may still be on its way out."""
    host, port = _host_port(rendezvous.address)
    limit = timedelta(seconds=timeout)
    if shard.rank == 0:
        server = TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=limit)
        board = Board(PrefixStore(rendezvous.name, server), wait)
        board.set("open", "yes")
        return board
    while True:
        try:
            # To a store that is not there yet, torch would come back only after half a second.
            socket.create_connection((host, port), CONNECT_SECONDS).close()
            server = TCPStore(host, port, wait_for_workers=False, timeout=timedelta(seconds=CONNECT_SECONDS))
            board = Board(PrefixStore(rendezvous.name, server), wait)
            board.get("open")
        except (OSError, dist.DistError):
            wait.pause()  # which tells whether there is any use in going on
        else:
            server.set_timeout(limit)
            return board


def local_address(host: str, port: int) -> str:
    """This node's address on the network that leads to `host`; loopback if host is."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]
