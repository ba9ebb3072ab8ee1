"""What the ranks of one stage do together: add up, and gather to the first.

Knows tensors and peers. `Alone` is a stage of one rank; `Distributed` goes through torch.distributed (gloo, NCCL);
`shared_memory.py` holds the fast one between ranks of one node.
"""

from __future__ import annotations

from typing import Protocol

import torch


class TensorGroup(Protocol):
    """The ranks that share the layers of one stage."""

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, the same bits on each. Contiguous x may be overwritten: use what is returned."""
        ...

    def gather(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        """Every rank's x [L, sizes[rank]] side by side, [L, sum(sizes)], on rank 0; None on the others."""
        ...

    def abort(self) -> None:
        """Make whoever waits in this group raise ConnectionError, now and from now on. From any thread."""
        ...

    def close(self) -> None: ...


class Alone:
    """One rank: nothing to do."""

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
    """The part that we use of torch's ProcessGroupGloo and ProcessGroupNCCL (torch's own stubs omit it)."""

    def rank(self) -> int: ...
    def size(self) -> int: ...
    def allreduce(self, tensors: list[torch.Tensor]) -> Pending: ...
    def send(self, tensors: list[torch.Tensor], destination: int, tag: int) -> Pending: ...
    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Pending: ...
    def abort(self) -> None: ...
    def shutdown(self) -> None: ...


class Distributed:
    """Ranks that only torch.distributed connects: several nodes, or devices with NCCL."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rank = connection.rank()
        self.size = connection.size()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
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
