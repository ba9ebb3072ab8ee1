"""What ranks do in the tests of dying groups. Not a test itself."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rank_processes import CPU

from qwen_ray.core.plan import Rendezvous, Shard, Span
from qwen_ray.parallel.groups import Groups

# Far longer than Ranks waits for an answer: nothing here may end by the group's own timeout.
LONG = 600.0


def shard(rank: int, tp: int, pp: int, dp: int = 1) -> Shard:
    stage, stage_rank = divmod(rank, dp * tp)
    dp_rank, tp_rank = divmod(stage_rank, tp)
    one = Span(0, 1)
    return Shard(
        rank=rank, world_size=dp * tp * pp, stage=stage, num_stages=pp, tp_rank=tp_rank, tp_size=tp, dp_rank=dp_rank,
        dp_size=dp, layers=one, heads=one, kv_heads=one, intermediate=one, vocab=one,
    )  # fmt: skip


def step(groups: Groups, part: Shard) -> float:
    """What a step asks of a group: from the previous stage, twice among the tensor ranks, to the next stage."""
    x = torch.full((3, 5), float(part.tp_rank + 1))
    if not part.is_first:
        x += groups.receive((3, 5), torch.float32)
    groups.tensor.all_reduce(x.clone())
    x = groups.tensor.all_reduce(x)
    if not part.is_last:
        groups.send(x)
    return x[0, 0].item()


def steps_until_a_death(rank: int, tp: int, pp: int, address: str, name: str, dying: int) -> str:
    """The error that ends this rank's steps; `dying` kills itself in the fourth."""
    part = shard(rank, tp, pp)
    groups = Groups(part, CPU)
    groups.join(Rendezvous(address=address, name=name), timeout=LONG)
    try:
        for i in itertools.count():
            if i == 3 and rank == dying:
                os.kill(os.getpid(), signal.SIGKILL)
            step(groups, part)
    except OSError as error:
        # As a rank would: its peers may be waiting for it, not for the dead one.
        groups.abort()
        return type(error).__name__
    finally:
        groups.close()
    raise AssertionError("unreachable")


def aborted_while_waiting(rank: int, tp: int, pp: int, address: str) -> str:
    """All wait for tensor rank 0 of the first stage, which is alive and does nothing; each is told to stop."""
    part = shard(rank, tp, pp)
    groups = Groups(part, CPU)
    groups.join(Rendezvous(address=address, name="abort"), timeout=LONG)
    if rank == 0:
        time.sleep(0.3)
        groups.abort()
        groups.close()
        return "idle"
    timer = threading.Timer(0.2, groups.abort)
    timer.start()
    try:
        step(groups, part)
    except OSError as error:
        return type(error).__name__
    finally:
        timer.join()
        groups.close()
    return "no error"


@dataclass
class Kept:
    """What a rank's process holds from one call of a test to the next, as layers would."""

    groups: Groups
    all_reduce: Callable[[torch.Tensor], torch.Tensor]


KEPT: dict[str, Kept] = {}  # of this process


def joined_until_a_death(rank: int, tp: int, pp: int, address: str, name: str, dying: int) -> bool:
    """Steps on the group that this process has, or on a new one, until `dying` kills itself. Whether it was there."""
    part = shard(rank, tp, pp)
    is_new = str(rank) not in KEPT
    if is_new:
        groups = Groups(part, CPU)
        KEPT[str(rank)] = Kept(groups, groups.tensor.all_reduce)
    kept = KEPT[str(rank)]
    kept.groups.join(Rendezvous(address=address, name=name), timeout=LONG)
    assert kept.all_reduce(torch.ones(3)).tolist() == [tp] * 3
    try:
        for i in itertools.count():
            if i == 3 and rank == dying:
                os.kill(os.getpid(), signal.SIGKILL)
            step(kept.groups, part)
    except OSError:
        kept.groups.abort()
    for operation in (kept.all_reduce, lambda x: step(kept.groups, part)):
        with contextlib.suppress(OSError):
            operation(torch.ones(3))
            assert tp == 1, "aborted groups raise"
    return not is_new


def forget(rank: int) -> None:
    """Leave the group that this process has kept."""
    if (kept := KEPT.pop(str(rank), None)) is not None:
        kept.groups.close()


def meets_nobody(rank: int, address: str, missing: int) -> tuple[list[bool], int, float]:
    """Rank `missing` of three does not come: the others are told to stop, by a thread and then by the clock.

    Whether it thinks that it has met them, how many files stay open, and what is summed when all have come in the end.
    """
    part = shard(rank, 3, 1)
    groups = Groups(part, CPU)
    before = len(os.listdir("/proc/self/fd"))
    has_met: list[bool] = []
    for name, timeout in (("aborted", LONG), ("late", 0.5)):
        timer = threading.Timer(0.3, groups.abort)
        if name == "aborted":
            timer.start()
        try:
            if rank != missing:
                groups.join(Rendezvous(address=address, name=name), timeout=timeout)
        except OSError:
            has_met.append(False)
        else:
            has_met.append(True)
        timer.cancel()
    after = len(os.listdir("/proc/self/fd"))
    groups.join(Rendezvous(address=address, name="all"), timeout=30)
    total = groups.tensor.all_reduce(torch.tensor([float(rank)])).item()
    groups.close()
    return has_met, after - before, total


def one_step(rank: int, tp: int, pp: int, address: str, name: str) -> float:
    part = shard(rank, tp, pp)
    groups = Groups(part, CPU)
    groups.join(Rendezvous(address=address, name=name), timeout=30)
    try:
        return step(groups, part)
    finally:
        groups.close()


def descriptors_after_groups(rank: int, address: str, num_groups: int) -> tuple[int, int]:
    """Open files before and after many groups."""
    before = len(os.listdir("/proc/self/fd"))
    for i in range(num_groups):
        part = shard(rank, 2, 1)
        groups = Groups(part, CPU)
        groups.join(Rendezvous(address=address, name=f"leak{i}"), timeout=30)
        step(groups, part)
        groups.close()
    return before, len(os.listdir("/proc/self/fd"))
