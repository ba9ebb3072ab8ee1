"""The groups that one rank belongs to: its tensor peers, its stage, and its neighbours in the pipeline.

Knows how ranks find each other and which means of talking they have. Knows no models. Everything is held in `Groups`:
there is no default process group, so that one process may be a member of several.
"""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from qwen_ray.core.plan import Rendezvous, Shard
from qwen_ray.parallel.collectives import Alone, Connection, Nccl, NcclPipe, Pipe, TensorGroup
from qwen_ray.parallel.link import Listener, connect
from qwen_ray.parallel.mesh import Mesh
from qwen_ray.parallel.shared_memory import SharedMemory

RETRY_SECONDS = 0.05


class Groups:
    """One rank's connections. Every operation raises an error soon after a peer has died or called `abort`."""

    def __init__(
        self,
        tensor: TensorGroup,
        *,
        device: torch.device,
        stage: TensorGroup | None = None,
        previous: Pipe | None = None,
        following: Pipe | None = None,
        store: Store | None = None,
    ) -> None:
        """`stage` None: the tensor ranks are all ranks of the stage."""
        self.tensor = tensor
        self.stage = stage or tensor
        self._device = device
        self._previous = previous
        self._next = following
        self._store = store  # NCCL comes back to it; and rank 0 serves it to the others

    @classmethod
    def join(cls, shard: Shard, rendezvous: Rendezvous, device: torch.device, *, timeout: float = 300.0) -> Groups:
        """Meet the other ranks; every rank of the plan has to call this. Rank 0 serves the store.

        `timeout` in seconds bounds this and each later operation: a last resort, for peers that hang without dying.
        """
        if shard.world_size == 1:
            return cls(Alone(), device=device)
        store = _open_store(rendezvous, shard.rank == 0, timeout)
        meeting = Meeting(shard, store, local_address(*_host_port(rendezvous.address)), device, timeout)
        previous, following = meeting.pipes()
        tensor = meeting.tensor_group()
        stage = meeting.stage_group() if shard.dp_size > 1 else tensor
        meeting.end()
        return cls(tensor, device=device, stage=stage, previous=previous, following=following, store=store)

    def send(self, x: torch.Tensor) -> None:
        """Send x to the next stage; may return before it has arrived. Empty: nothing to do, both ends know the size."""
        assert self._next is not None, "the last stage sends to nobody"
        if x.numel():
            self._next.send(x)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """What the previous stage sent next."""
        assert self._previous is not None, "the first stage receives from nobody"
        x = torch.empty(shape, dtype=dtype, device=self._device)
        return self._previous.receive(x) if x.numel() else x

    def abort(self) -> None:
        """Make every operation raise, also one that waits, here and on the peers. From any thread, and for good."""
        for part in self._parts():
            part.abort()

    def close(self) -> None:
        for part in self._parts():
            part.close()
        self._store = None

    def _parts(self) -> list[TensorGroup | Pipe]:
        stage = None if self.stage is self.tensor else self.stage
        return [part for part in (self.tensor, stage, self._previous, self._next) if part is not None]


class Meeting:
    """The ranks of one replica getting to know each other, seen from one of them."""

    def __init__(self, shard: Shard, store: Store, address: str, device: torch.device, timeout: float) -> None:
        """`address`: where peers can reach this rank."""
        self._shard = shard
        self._store = store
        self._address = address
        self._device = device
        self._timeout = timeout

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
        store = PrefixStore(name, self._store)
        if self._device.type == "cuda":
            return Nccl(self._nccl(store, rank, size))
        shared = SharedMemory.join(store, rank, size, timeout=self._timeout)
        return shared or Mesh.join(store, rank, size, self._address, self._timeout)

    def pipes(self) -> tuple[Pipe | None, Pipe | None]:
        """From the previous stage, and to the next."""
        receives, sends = not self._shard.is_first, not self._shard.is_last
        incoming, outgoing = f"to{self._shard.rank}", f"to{self._shard.next_rank}"
        if self._device.type == "cuda":
            # Stage by stage, so that both ends of a pair are made at the same time.
            previous = NcclPipe(self._nccl(PrefixStore(incoming, self._store), 1, 2)) if receives else None
            following = NcclPipe(self._nccl(PrefixStore(outgoing, self._store), 0, 2)) if sends else None
            return previous, following
        listener = Listener(self._store, incoming, self._address) if receives else None
        following = connect(self._store, outgoing, self._timeout) if sends else None
        return listener.accept(self._timeout) if listener else None, following

    def end(self) -> None:
        """Rank 0 stays until all others need its store no more: it may be closed right after."""
        self._store.set(f"joined{self._shard.rank}", "yes")
        if self._shard.rank == 0:
            self._store.wait([f"joined{rank}" for rank in range(self._shard.world_size)])

    def _nccl(self, store: Store, rank: int, size: int) -> Connection:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self._timeout)
        return cast(Connection, dist.ProcessGroupNCCL(store, rank, size, options))


def _host_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _open_store(rendezvous: Rendezvous, is_server: bool, timeout: float) -> Store:
    """The store of this very group: at its address, that of the group before it may still be on its way out."""
    host, port = _host_port(rendezvous.address)
    deadline = time.monotonic() + timeout
    while True:
        left = timedelta(seconds=max(deadline - time.monotonic(), 1.0))
        try:
            server = TCPStore(host, port, is_master=is_server, timeout=left, wait_for_workers=False)
            store = PrefixStore(rendezvous.name, server)
            if is_server:
                store.set("open", "yes")
            store.get("open")
        except dist.DistError:
            if is_server or time.monotonic() > deadline:
                raise
            time.sleep(RETRY_SECONDS)
        else:
            server.set_timeout(timedelta(seconds=timeout))
            return store


def local_address(host: str, port: int) -> str:
    """This node's address on the network that leads to `host`; loopback if host is."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]
