"""The groups that one rank belongs to: its tensor peers, and its neighbours in the pipeline.

Knows torch.distributed, and how ranks find each other. Knows no models. Everything is held in `Groups`: there is no
default process group, so that one process may be a member of several.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore

from qwen_ray.core.plan import Rendezvous, Shard
from qwen_ray.parallel.collectives import Alone, Connection, Distributed, Pending, TensorGroup


class Groups:
    """One rank's connections. A group of one rank has none, and all its operations are the identity."""

    def __init__(self, shard: Shard, device: torch.device, tensor: TensorGroup, world: Connection | None) -> None:
        self.tensor = tensor
        self._shard = shard
        self._device = device
        self._world = world
        self._sending: tuple[Pending, torch.Tensor] | None = None

    @classmethod
    def join(cls, shard: Shard, rendezvous: Rendezvous, device: torch.device, *, timeout: float = 300.0) -> Groups:
        """Meet the other ranks; every rank of the plan has to call this. Rank 0 serves the store.

        `timeout` in seconds bounds this and each later operation: a last resort, for peers that hang without dying.
        """
        if shard.world_size == 1:
            return cls(shard, device, Alone(), None)
        host, _, port = rendezvous.address.rpartition(":")
        limit = timedelta(seconds=timeout)
        store = TCPStore(host.strip("[]"), int(port), is_master=shard.rank == 0, timeout=limit, wait_for_workers=False)
        store = PrefixStore(rendezvous.name, store)
        address = local_address(host.strip("[]"), int(port))
        world = None
        if shard.num_stages > 1:
            world = connect(PrefixStore("world", store), shard.rank, shard.world_size, device, address, limit)
        tensor: TensorGroup = Alone()
        if shard.tp_size > 1:
            own = PrefixStore(f"stage{shard.stage}", store)
            tensor = Distributed(connect(own, shard.tp_rank, shard.tp_size, device, address, limit))
        return cls(shard, device, tensor, world)

    def send(self, x: torch.Tensor) -> None:
        """Send x to the next stage. Returns before it has arrived: a stage goes on with its next step."""
        assert self._world is not None
        assert self._shard.next_rank is not None
        if self._sending is not None:
            self._sending[0].wait()
        x = x.contiguous()
        self._sending = (self._world.send([x], self._shard.next_rank, 0), x)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """What the previous stage sent next."""
        assert self._world is not None
        assert self._shard.previous_rank is not None
        x = torch.empty(shape, dtype=dtype, device=self._device)
        self._world.recv([x], self._shard.previous_rank, 0).wait()
        return x

    def abort(self) -> None:
        """Make every operation that waits raise, here and on the peers. From any thread; the group is then unusable."""
        self.tensor.abort()
        if self._world is not None:
            self._world.abort()

    def close(self) -> None:
        self.tensor.close()
        if self._world is not None:
            self._world.shutdown()


def local_address(host: str, port: int) -> str:
    """This node's address on the network that leads to `host`: what peers can reach, loopback if host is."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]


def connect(store: Store, rank: int, size: int, device: torch.device, address: str, timeout: timedelta) -> Connection:
    """A process group of its own, bound to the interface of `address`; NCCL between CUDA devices, gloo otherwise."""
    if device.type == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return cast(Connection, dist.ProcessGroupNCCL(store, rank, size, nccl))
    gloo: Any = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    gloo._timeout = timeout
    gloo._devices = [ProcessGroupGloo.create_device(hostname=address)]
    return cast(Connection, ProcessGroupGloo(store, rank, size, gloo))
