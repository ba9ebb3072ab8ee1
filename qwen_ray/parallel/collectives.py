"""What the ranks of one replica do together, whatever connects them.

`TensorGroup`: the ranks that share the layers of a stage add up, gather and exchange rows. `Pipe`: hidden states go
from a stage to the next. Here are those for one rank alone and for CUDA (NCCL through torch.distributed);
`shared_memory.py`, `mesh.py` and `link.py` have those of CPU ranks. Every operation raises OSError or torch's
DistBackendError when a peer is gone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch


class TensorGroup(Protocol):
    """Ranks that share the layers of one stage: all of them call the same operations in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, the same bits on each. x may be overwritten: use what is returned."""
        ...

    def gather(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        """Every rank's x [L, sizes[rank]] side by side, [L, sum(sizes)], on rank 0; None on the others."""
        ...

    def all_to_all(self, x: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """Every rank's rows for this one, in rank order, and how many came from each.

        x [n, ...] has `counts[0]` rows for rank 0, then `counts[1]` for rank 1, …; they add up to n, and any may be 0.
        Any dtype, which is the same on all ranks, as is the shape of a row.
        """
        ...

    def abort(self) -> None:
        """Make every operation raise, also one that waits, here and on the peers, now and later. From any thread."""
        ...

    def close(self) -> None: ...


class Alone:
    """A TensorGroup of one rank: nothing to do."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        return x

    def all_to_all(self, x: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        return x, list(counts)

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
    def alltoall_base(
        self, output: torch.Tensor, input: torch.Tensor, output_splits: list[int], input_splits: list[int]
    ) -> Pending: ...
    def send(self, tensors: list[torch.Tensor], destination: int, tag: int) -> Pending: ...
    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Pending: ...
    def abort(self) -> None: ...
    def shutdown(self) -> None: ...


class Nccl:
    """A TensorGroup of CUDA devices."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.rank = connection.rank()
        self.size = connection.size()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:
            return x
        x = x.contiguous()
        self._connection.allreduce([x]).wait()
        return x

    def gather(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        if x.shape[0] == 0:
            return x.new_empty(0, sum(sizes)) if self.rank == 0 else None
        if self.rank != 0:
            self._connection.send([x.contiguous()], 0, 0).wait()
            return None
        parts = [x, *(x.new_empty(x.shape[0], size) for size in sizes[1:])]
        for peer, part in enumerate(parts[1:], start=1):
            self._connection.recv([part], peer, 0).wait()
        return torch.cat(parts, dim=-1)

    def all_to_all(self, x: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """Waits for the device: how many rows come is known to the peers alone."""
        told = torch.tensor(counts, dtype=torch.int64, device=x.device)
        heard = torch.zeros_like(told)
        self._connection.alltoall_base(heard, told, [], []).wait()
        received = heard.tolist()
        out = x.new_empty(sum(received), *x.shape[1:])
        # As bytes: NCCL does not know all types. Where a peer was aborted above, `received` is wrong and this raises.
        self._connection.alltoall_base(_byte_rows(out), _byte_rows(x), received, list(counts)).wait()
        return out, received

    def abort(self) -> None:
        self._connection.abort()

    def close(self) -> None:
        self._connection.shutdown()


def _byte_rows(x: torch.Tensor) -> torch.Tensor:
    """x [n, ...] as uint8 [n, bytes of a row]; the same memory if x is contiguous."""
    return x.contiguous().view(len(x), math.prod(x.shape[1:])).view(torch.uint8)


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


def bytes_of(x: torch.Tensor) -> memoryview:
    """The memory of contiguous x, on the CPU."""
    return memoryview(cast(Any, x.view(-1).view(torch.uint8).numpy()))
