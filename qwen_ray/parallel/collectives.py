"""What the ranks of one replica do together, whatever connects them.

`TensorGroup`: the ranks that share the layers of a stage add up and gather. `Pipe`: hidden states go from a stage to
the next. Here are those for one rank alone and for CUDA (NCCL through torch.distributed); `shared_memory.py` and
`link.py` have those of CPU ranks. Every operation raises OSError or torch's DistBackendError when a peer is gone.
"""

from __future__ import annotations

from typing import Protocol

import torch


class TensorGroup(Protocol):
    """The ranks that share the layers of one stage."""

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, the same bits on each. x may be overwritten: use what is returned."""
        ...

    def gather(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        """Every rank's x [L, sizes[rank]] side by side, [L, sum(sizes)], on rank 0; None on the others."""
        ...

    def abort(self) -> None:
        """Make every operation raise, also one that waits, here and on the peers, now and later. From any thread."""
        ...

    def close(self) -> None: ...


class Alone:
    """A TensorGroup of one rank: nothing to do."""

    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        return x

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


class Pending(Protocol):
    def wait(self) -> object: ...


class Connection(Protocol):
    """The part that we use of torch's ProcessGroupNCCL (torch's own stubs omit it)."""

    def rank(self) -> int: ...
    def size(self) -> int: ...
    def allreduce(self, tensors: list[torch.Tensor]) -> Pending: ...
    def send(self, tensors: list[torch.Tensor], destination: int, tag: int) -> Pending: ...
    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Pending: ...
    def abort(self) -> None: ...
    def shutdown(self) -> None: ...


class Nccl:
    """A TensorGroup of CUDA devices."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rank = connection.rank()
        self.size = connection.size()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        self._connection.allreduce([x]).wait()
        return x

    def gather(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        if self._rank != 0:
            self._connection.send([x.contiguous()], 0, 0).wait()
            return None
        parts = [x, *(x.new_empty(x.shape[0], size) for size in sizes[1:])]
        for peer, part in enumerate(parts[1:], start=1):
            self._connection.recv([part], peer, 0).wait()
        return torch.cat(parts, dim=-1)

    def abort(self) -> None:
        self._connection.abort()

    def close(self) -> None:
        self._connection.shutdown()


class Pipe(Protocol):
    """One end of the way from a stage to the next."""

    def send(self, x: torch.Tensor) -> None:
        """May return before x has arrived."""
        ...

    def receive(self, x: torch.Tensor) -> torch.Tensor:
        """Fill contiguous x with what was sent next."""
        ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


class NcclPipe:
    def __init__(self, connection: Connection) -> None:
        """Of two ranks: 0 sends, 1 receives."""
        self._connection = connection

    def send(self, x: torch.Tensor) -> None:
        self._connection.send([x.contiguous()], 1, 0).wait()  # waits on the stream, not here

    def receive(self, x: torch.Tensor) -> torch.Tensor:
        self._connection.recv([x], 0, 0).wait()
        return x

    def abort(self) -> None:
        self._connection.abort()

    def close(self) -> None:
        self._connection.shutdown()
