"""What ranks do in the tests of stage groups: exchanging rows, and dying of it. Not a test itself."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from rank_deaths import LONG, shard
from rank_processes import CPU
from torch._C._distributed_c10d import PrefixStore, TCPStore

from qwen_ray.core.plan import Rendezvous, Shard
from qwen_ray.parallel.board import Board, Wait
from qwen_ray.parallel.collectives import TensorGroup
from qwen_ray.parallel.groups import Groups
from qwen_ray.parallel.mesh import Mesh
from qwen_ray.parallel.shared_memory import SharedMemory

Degrees = tuple[int, int, int]  # tp, dp, pp
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]
MOST_BYTES = 1 << 20  # for one rank: more than a slot of shared memory


@contextlib.contextmanager
def joined(rank: int, degrees: Degrees, address: str, sharing: str, timeout: float = 30.0) -> Iterator[Groups]:
    """The rank's groups. `sharing`: whether there is "memory" to share, or "none", or only within a "dp rank"."""
    tp, dp, pp = degrees
    join = SharedMemory.join

    def join_some(board: Board, rank: int, size: int, *, timeout: float) -> SharedMemory | None:
        return join(board, rank, size, timeout=timeout) if sharing == "dp rank" and size == tp else None

    rendezvous = Rendezvous(address=address, name="test-exchanges")
    patched = mock.patch.object(SharedMemory, "join", join_some)
    groups = Groups(shard(rank, tp, pp, dp), CPU)
    with patched if sharing != "memory" else contextlib.nullcontext():
        groups.join(rendezvous, timeout=timeout)
    try:
        yield groups
    finally:
        groups.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Whom a rank met: sets of ranks as sums of powers of two."""

    tensor: int
    stage: int
    in_order: list[int]  # the stage's ranks, as rows came from them
    from_previous: list[float]
    kinds: tuple[str, str]  # of the tensor group and the stage's
    is_one: bool


def meet(rank: int, degrees: Degrees, address: str, sharing: str) -> Meeting:
    with joined(rank, degrees, address, sharing) as groups:
        part = shard(rank, degrees[0], degrees[2], degrees[1])
        groups.stage.all_reduce(torch.empty(0, 3))  # nobody waits
        ranks, counts = groups.stage.all_to_all(torch.full((groups.stage.size,), rank), [1] * groups.stage.size)
        assert counts == [1] * part.stage_size
        return Meeting(
            tensor=int(groups.tensor.all_reduce(torch.tensor(1 << rank))),
            stage=int(groups.stage.all_reduce(torch.tensor(1 << rank))),
            in_order=ranks.tolist(),
            from_previous=hand_on(groups, part),
            kinds=(type(groups.tensor.connection).__name__, type(groups.stage.connection).__name__),
            is_one=groups.tensor is groups.stage,
        )


def hand_on(groups: Groups, part: Shard) -> list[float]:
    """To the next stage: nothing, then this rank. What came from the previous one."""
    came: list[float] = []
    for count in (0, 1):
        if not part.is_first:
            came += groups.receive((count,), torch.float32).tolist()
        if not part.is_last:
            groups.send(torch.full((count,), float(part.rank)))
    return came


def tables(size: int) -> list[list[list[int]]]:
    """`counts[from][to]`: nothing at all, nothing of some, everything to one rank, everything from one."""
    last = size - 1
    return [
        [[0] * size for _ in range(size)],
        [[3 * (source == 0 and to == last) for to in range(size)] for source in range(size)],
        [[500 * (to == last) for to in range(size)] for source in range(size)],
        [[500 * (source == last) for to in range(size)] for source in range(size)],
        [[source * size + to for to in range(size)] for source in range(size)],
    ]


def random_table(size: int, most: int, draw: random.Random) -> list[list[int]]:
    return [[draw.choice((0, 1, draw.randint(0, most), most)) for _ in range(size)] for _ in range(size)]


def exchange_many(rank: int, size: int, address: str, kind: str, seed: int, num_rounds: int) -> int:
    """Exchanges with counts known to all, against what one process makes of them. Returns the longest, in bytes."""
    server = TCPStore(address.split(":")[0], int(address.split(":")[1]), None, rank == 0)
    board = Board(PrefixStore(f"{kind}{seed}", server), Wait(30))
    group: TensorGroup | None
    if kind == "memory":
        group = SharedMemory.join(board, rank, size, timeout=30)
    else:
        group = Mesh.join(board, rank, size, "127.0.0.1", 30)
    assert group is not None
    draw = random.Random(seed)  # the same on all ranks
    longest = 0
    for i in range(num_rounds):
        dtype, row = draw.choice(DTYPES), draw.choice([(), (1,), (7,), (2, 300)])
        most = MOST_BYTES // (dtype.itemsize * math.prod(row)) if i % 10 == 9 else 40
        counts = tables(size)[i] if i < len(tables(size)) else random_table(size, most, draw)
        inputs = [rows(f"{seed} {i} {source}", sum(counts[source]), row, dtype) for source in range(size)]
        parts = [x.split(own) for x, own in zip(inputs, counts, strict=True)]
        found, received = group.all_to_all(inputs[rank].clone(), counts[rank])
        expected = torch.cat([from_peer[rank] for from_peer in parts])
        assert received == [own[rank] for own in counts]
        assert (found.shape, found.dtype) == (expected.shape, dtype)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), f"round {i}: {counts}"
        if i % 3 == 0:
            assert group.all_reduce(torch.full((9,), float(i))).tolist() == [i * size] * 9
        longest = max(longest, inputs[rank].nbytes)
    group.close()
    return longest


def rows(seed: str, count: int, row: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random bits, NaNs among them."""
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(32))
    high = 2 if dtype is torch.bool else 256
    num_bytes = count * math.prod(row) * dtype.itemsize
    return torch.randint(0, high, (num_bytes,), dtype=torch.uint8, generator=generator).view(dtype).view(count, *row)


def work(groups: Groups, part: Shard, num_rows: int) -> None:
    """What a step with experts asks of its groups."""
    x = torch.ones(num_rows, 64)
    if not part.is_first:
        groups.receive((4,), torch.float32)
    groups.tensor.all_reduce(x)
    counts = [0] * groups.stage.size
    counts[(part.stage_rank + 1) % groups.stage.size] = num_rows
    there, received = groups.stage.all_to_all(x, counts)
    groups.stage.all_to_all(there, received)
    if not part.is_last:
        groups.send(torch.ones(4))


def exchange_until_a_death(
    rank: int, degrees: Degrees, address: str, sharing: str, dying: int, delay: float, num_rows: int
) -> str:
    """The error that ends this rank's exchanges; `dying` is killed amid them, `delay` seconds after they began."""
    tp, dp, pp = degrees
    part = shard(rank, tp, pp, dp)
    with joined(rank, degrees, address, sharing, LONG) as groups:
        work(groups, part, num_rows)
        if rank == dying:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        try:
            for _ in itertools.count():
                work(groups, part, num_rows)
        except OSError as error:
            # As a rank would: the other stages wait for it.
            groups.abort()
            return type(error).__name__
    raise AssertionError("unreachable")


def wait_for_an_idle_rank(rank: int, degrees: Degrees, address: str, sharing: str, ended: Path) -> str:
    """All of the stage wait for rank 0, which is alive and does nothing; rank 1 alone is told to stop.

    Rank 0 goes on when the others have left their marks in `ended`, so that they hear of nothing but the abort.
    """
    with joined(rank, degrees, address, sharing, LONG) as groups:
        if rank == 0:
            deadline = time.monotonic() + 20
            while len(list(ended.iterdir())) < groups.stage.size - 1 and time.monotonic() < deadline:
                time.sleep(0.01)
            return str(len(list(ended.iterdir())))
        timer = threading.Timer(0.1, groups.abort)
        if rank == 1:
            timer.start()
        try:
            groups.stage.all_to_all(torch.ones(groups.stage.size, 4), [1] * groups.stage.size)
        except OSError as error:
            (ended / str(rank)).touch()
            return type(error).__name__
    raise AssertionError("rank 0 had not taken part")
