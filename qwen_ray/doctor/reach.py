"""Two ranks meet and add up a tensor, as the ranks of a model do: over TCP, and with GPUs over NCCL.

    python -m qwen_ray.doctor.reach        a list of Meetings (JSON) on stdin; a JSON line for each on stdout

Each of the two runs one such process on its node. `attend` is the other end.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from qwen_ray.parallel.board import Board, Wait
from qwen_ray.parallel.collectives import Connection, Nccl, TensorGroup
from qwen_ray.parallel.mesh import Mesh

MEETING_SECONDS = 20.0
START_SECONDS = 90.0  # until torch is imported, on a busy machine
NUM_NUMBERS = 2**18  # a megabyte
CONNECT_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Of ranks 0 and 1, at `host`:`port`, which is rank 0's; `own` is the address where the other one finds this."""

    rank: int
    host: str
    port: int
    own: str
    is_nccl: bool = False
    device: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Met:
    """`error` is empty where they met; `seconds` for one sum, once connected."""

    error: str = ""
    seconds: float = 0.0


def attend(meetings: Sequence[Meeting], python: str = sys.executable) -> list[Met]:
    """One after the other, in a process of their own; bounded in time."""
    command = [python, "-m", "qwen_ray.doctor.reach"]
    asked = json.dumps([asdict(meeting) for meeting in meetings])
    seconds = START_SECONDS + len(meetings) * 2 * MEETING_SECONDS
    try:
        answer = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=seconds, check=False)
        said, why = answer.stdout, (answer.stderr.strip().splitlines() or ["it ended"])[-1]
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        why = f"no end within {seconds:.0f} s"
    met = [Met(**json.loads(line)) for line in said.splitlines() if line.startswith("{")]
    return met + [Met(error=why)] * (len(meetings) - len(met))


def free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.bind((host, 0))
        return one.getsockname()[1]


def meet(meeting: Meeting) -> Met:
    try:
        wait = Wait(MEETING_SECONDS)
        board = _board(meeting, wait)
        group: TensorGroup = (
            _nccl(board, meeting)
            if meeting.is_nccl
            else Mesh.join(board, meeting.rank, 2, meeting.own, MEETING_SECONDS)
        )
        device = f"cuda:{meeting.device}" if meeting.is_nccl else "cpu"
        sums: list[float] = []
        seconds = 0.0
        for _ in range(2):  # the first one also makes connections
            begun = time.perf_counter()
            x = group.all_reduce(torch.full((NUM_NUMBERS,), meeting.rank + 1.0, device=device))
            sums.append(float(x.sum().cpu()))
            seconds = time.perf_counter() - begun
        if meeting.rank == 0:  # its process holds the board: it leaves last
            board.get("done")
        else:
            board.set("done", "yes")
        group.close()
    except (OSError, RuntimeError) as error:
        return Met(error=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
    right = 3.0 * NUM_NUMBERS
    return Met(seconds=seconds) if sums == [right] * 2 else Met(error=f"their sum is {sums[-1]}, not {right}")


def _board(meeting: Meeting, wait: Wait) -> Board:
    """Raises OSError where the other rank does not come or cannot be reached."""
    limit = timedelta(seconds=MEETING_SECONDS)
    if meeting.rank == 0:
        store = TCPStore(meeting.host, meeting.port, is_master=True, wait_for_workers=False, timeout=limit)
        return Board(store, wait)
    while True:
        try:
            socket.create_connection((meeting.host, meeting.port), CONNECT_SECONDS).close()
            return Board(TCPStore(meeting.host, meeting.port, wait_for_workers=False, timeout=limit), wait)
        except OSError as error:
            try:
                wait.pause()
            except TimeoutError:
                raise error from None


def _nccl(board: Board, meeting: Meeting) -> Nccl:
    torch.cuda.set_device(meeting.device)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=MEETING_SECONDS)
    return Nccl(cast(Connection, dist.ProcessGroupNCCL(board.store, meeting.rank, 2, options)))


def main() -> None:
    for line in json.loads(sys.stdin.read()):
        met = meet(Meeting(**line))
        sys.stdout.write(json.dumps(asdict(met)) + "\n")
        sys.stdout.flush()
    os._exit(0)  # a store whose peer is gone would be waited for


if __name__ == "__main__":
    main()
