"""The groups that one rank belongs to: its tensor peers, its stage, and its neighbours in the pipeline.

Knows when this rank is connected and when it is not; how ranks find each other is `meeting.py`'s. Knows no models.
Everything is held in `Groups`: there is no default process group, so that one process may be a member of several.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
import torch.distributed as dist

from qwen_ray.core.plan import Rendezvous, Shard
from qwen_ray.parallel.board import Wait
from qwen_ray.parallel.collectives import Alone, TensorGroup
from qwen_ray.parallel.meeting import Connections, meet

MEETING_SECONDS = 60.0


class Peers:
    """A TensorGroup that stays while its connection is replaced: layers may keep it, and its methods.

    Whoever is not connected gets OSError. `is_waiting` says, to any thread, that an operation is under way: this rank
    then waits for the others, or works for them.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.is_waiting = False
        self._connection: TensorGroup | None = Alone() if size == 1 else None

    @property
    def connection(self) -> TensorGroup:
        if self._connection is None:
            raise ConnectionError("this rank has not met the others")
        return self._connection

    def connect(self, connection: TensorGroup | None) -> None:
        self.is_waiting = False
        self._connection = Alone() if self.size == 1 else connection

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.is_waiting = True
        total = self.connection.all_reduce(x)
        self.is_waiting = False
        return total

    def gather(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        self.is_waiting = True
        whole = self.connection.gather(x, sizes)
        self.is_waiting = False
        return whole

    def all_to_all(self, x: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        self.is_waiting = True
        rows = self.connection.all_to_all(x, counts)
        self.is_waiting = False
        return rows

    def abort(self) -> None:
        if self._connection is not None:
            self._connection.abort()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


class Groups:
    """One rank's connections: none at first, then those of the last `join`.

    Every operation raises an error soon after a peer has died or called `abort`, and until this rank has joined again.
    `tensor`, `stage` and this object itself stay the same.
    """

    def __init__(self, shard: Shard, device: torch.device) -> None:
        self.tensor = Peers(shard.tp_rank, shard.tp_size)
        self.stage = Peers(shard.stage_rank, shard.stage_size) if shard.dp_size > 1 else self.tensor
        self._shard = shard
        self._device = device
        self._is_waiting = False  # in the pipeline
        self._lock = threading.Lock()  # `abort` comes from other threads: it finds what is being made, or what is made
        self._wait: Wait | None = None
        self._connections: Connections | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether this rank is in an operation with others, seen from any thread. On CUDA, where operations are only
        put into a queue, this says little."""
        return self._is_waiting or self.tensor.is_waiting or self.stage.is_waiting

    def join(self, rendezvous: Rendezvous, *, timeout: float = 300.0) -> None:
        """Leave what was, and meet the other ranks; every rank of the plan has to call this.

        `timeout` in seconds bounds each later operation: a last resort, for peers that hang without dying. Raises
        OSError; then this rank is alone, and may join again.
        """
        self.close()
        if self._shard.world_size == 1:
            return
        with self._lock:
            self._wait = wait = Wait(min(MEETING_SECONDS, timeout))
        try:
            connections = meet(self._shard, rendezvous, self._device, wait, timeout=timeout)
        except dist.DistError as error:
            raise ConnectionResetError(f"the meeting of the ranks has ended: {error}") from error
        with self._lock:
            self._wait = None
            if not wait.is_aborted:
                self._connections = connections
        if self._connections is None:
            _close(connections)
            raise ConnectionAbortedError("the meeting of the ranks was aborted")
        self.tensor.connect(connections.tensor)
        if connections.stage is not None:
            self.stage.connect(connections.stage)

    def send(self, x: torch.Tensor) -> None:
        """Send x to the next stage; may return before it has arrived. Empty: nothing to do, both ends know the size."""
        if x.numel():
            self._is_waiting = True
            following = self._joined().following
            assert following is not None, "the last stage sends to nobody"
            following.send(x)
            self._is_waiting = False

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """What the previous stage sent next."""
        x = torch.empty(shape, dtype=dtype, device=self._device)
        if x.numel():
            self._is_waiting = True
            previous = self._joined().previous
            assert previous is not None, "the first stage receives from nobody"
            x = previous.receive(x)
            self._is_waiting = False
        return x

    def abort(self) -> None:
        """Make every operation raise, also one that waits, here and on the peers, until the next `join`; one that is
        under way too. From any thread."""
        with self._lock:
            if self._wait is not None:
                self._wait.abort()
            for part in self._connections.parts if self._connections else ():
                part.abort()

    def close(self) -> None:
        """Leave: peers that still want something of this rank fail."""
        with self._lock:
            connections, self._connections = self._connections, None
        self.tensor.connect(None)
        self.stage.connect(None)
        self._is_waiting = False
        if connections is not None:
            _close(connections)

    def _joined(self) -> Connections:
        if self._connections is None:
            raise ConnectionError("this rank has not met the others")
        return self._connections


def _close(connections: Connections) -> None:
    for part in connections.parts:
        part.close()
