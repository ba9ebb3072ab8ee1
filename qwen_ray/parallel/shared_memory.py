"""Sums, gathers and exchanges between the ranks of one node, through memory that they share.

Every rank has a slot: it writes its part there, raises its sequence number and waits for the others'. Slots are double,
so that one such barrier per exchange is enough: to write exchange n, a rank needs the others to have written n - 1, and
they wrote that after they had read n - 2, which lay in the same half. Sums run in rank order, so all ranks get the
same bits.

The segment has no name that could outlive its users: it is an anonymous file that peers open through /proc. Every rank
holds a lock on one byte of it; the kernel drops it with the process, and so a death is noticed whatever the cause.

Only for x86-64, whose stores become visible in the order in which they were made.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import platform
import secrets
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from qwen_ray.core.plan import Span
from qwen_ray.parallel.board import Board
from qwen_ray.parallel.collectives import bytes_of

CAPACITY = 512 * 1024  # bytes of a slot's half: two slots fit a core's cache
LINE = 128  # bytes: two cache lines, which the processor fetches together
WORDS_PER_LINE = LINE // 8
ABORTED = WORDS_PER_LINE  # index of the abort flag's word; the nonce has the line before it
NONCE_BYTES = 16
SPINS = 200  # about 20 microseconds; a peer that is running answers within them
YIELD_SECONDS = 1e-3
SLEEP_SECONDS = 50e-6
ALIVE_SECONDS = 20e-3  # how often a sleeper looks whether its peers live


class SharedMemory:
    """A TensorGroup. Not thread-safe, `abort` excepted; raises OSError when a peer dies, hangs or aborts."""

    def __init__(self, fd: int, rank: int, size: int, *, timeout: float, capacity: int) -> None:
        self.rank = rank
        self.size = size
        self._fd = fd
        self._timeout = timeout
        self._capacity = capacity
        self._sequence = 0
        memory = mmap.mmap(fd, segment_bytes(size, capacity))
        self._words = memoryview(memory)[: _header_bytes(size)].cast("Q")
        self._own_word = _sequence_word(rank)
        self._peers = [peer for peer in range(size) if peer != rank]
        slots = memoryview(memory)[_header_bytes(size) :]
        self._slots = [slots[start : start + capacity] for start in range(0, len(slots), capacity)]
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._views_key: tuple[torch.dtype, int] | None = None
        self._views: list[tuple[torch.Tensor, ...]] = []
        _set_lock(fd, rank, fcntl.F_WRLCK)

    @classmethod
    def join(
        cls, board: Board, rank: int, size: int, *, timeout: float, capacity: int = CAPACITY
    ) -> SharedMemory | None:
        """Meet the other ranks through `board`. None, on all of them, where they cannot share memory."""
        with ExitStack() as opened:
            own: SharedMemory | None = None
            if rank == 0:
                nonce = secrets.token_bytes(NONCE_BYTES)
                fd = os.memfd_create("qwen-ray")
                os.ftruncate(fd, segment_bytes(size, capacity))
                os.pwrite(fd, nonce, 0)
                board.set("segment", f"{os.getpid()} {fd} {nonce.hex()}")
            else:
                pid, number, nonce = board.get("segment").decode().split()
                fd = _open(f"/proc/{pid}/fd/{number}", bytes.fromhex(nonce))
            if fd is not None and sys.platform == "linux" and platform.machine() == "x86_64":
                own = cls(fd, rank, size, timeout=timeout, capacity=capacity)
                opened.callback(own.close)
            board.set(f"attached{rank}", "no" if own is None else "yes")
            if all(board.get(f"attached{peer}") == b"yes" for peer in range(size)):
                opened.pop_all()
                return own
        return None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:
            return x
        flat = x.reshape(-1)
        if flat.nbytes <= self._capacity:
            self._sum(flat)
        else:
            for piece in flat.split(self._capacity // x.itemsize):
                self._sum(piece)
        return flat.view(x.shape)

    def _sum(self, piece: torch.Tensor) -> None:
        slots = self._write(piece)
        self._wait_for_all()
        _add(slots, piece)

    def gather(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        num_rows, step = x.shape[0], self._capacity // x.itemsize
        flat = x.reshape(-1)
        parts = [x.new_empty(num_rows * size) for size in sizes] if self.rank == 0 else []
        for start in range(0, num_rows * max(sizes), step):
            slots = self._write(flat[start : start + step], step)
            if self.rank == 0:
                self._wait_for_all()
                for part, slot in zip(parts, slots, strict=True):
                    piece = part[start : start + step]
                    piece.copy_(slot[: piece.numel()])
        if self.rank != 0:
            return None
        return torch.cat([part.view(num_rows, size) for part, size in zip(parts, sizes, strict=True)], dim=-1)

    def all_to_all(self, x: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """What a rank has to say is `counts`, then its rows for the others: as many exchanges as the longest needs."""
        assert len(x) == sum(counts), f"{len(x)} rows, of which {counts} are for the ranks"
        row_bytes = x.itemsize * math.prod(x.shape[1:])
        rows = bytes_of(x.contiguous())
        own = Span(sum(counts[: self.rank]), sum(counts[: self.rank + 1])).scaled(row_bytes)
        first = 8 * self.size  # a count takes 8 bytes
        said = [(first, rows[: own.start]), (first + own.start, rows[own.stop :])]

        slots = self._exchange(said, 0, counts)
        table = [struct.unpack_from(f"{self.size}q", slot) for slot in slots]
        received = [from_peer[self.rank] for from_peer in table]
        out = x.new_empty(sum(received), *x.shape[1:])
        heard: list[tuple[int, memoryview]] = []
        left = bytes_of(out)
        for peer, from_peer in enumerate(table):
            part, left = left[: received[peer] * row_bytes], left[received[peer] * row_bytes :]
            if peer == self.rank:
                part[:] = rows[own.start : own.stop]
            before = sum(from_peer[: self.rank]) - (from_peer[peer] if peer < self.rank else 0)
            heard.append((first + before * row_bytes, part))
        longest = first + max(sum(c) - c[peer] for peer, c in enumerate(table)) * row_bytes
        for place in range(0, longest, self._capacity):
            slots = self._exchange(said, place) if place else slots
            for peer in self._peers:
                in_slot, in_part = self._overlap(place, *heard[peer])
                heard[peer][1][in_part] = slots[peer][in_slot]
        return out, received

    def _exchange(self, said: list[tuple[int, memoryview]], place: int, counts: Sequence[int] = ()) -> list[memoryview]:
        """Show what lies at `place` of all that this rank has `said`; returns all ranks' slots."""
        self._wait_for_all()
        self._sequence += 1
        first = (self._sequence & 1) * self.size
        slots = self._slots[first : first + self.size]
        if counts:
            struct.pack_into(f"{self.size}q", slots[self.rank], 0, *counts)
        for start, part in said:
            in_slot, in_part = self._overlap(place, start, part)
            slots[self.rank][in_slot] = part[in_part]
        self._words[self._own_word] = self._sequence
        self._wait_for_all()
        return slots

    def _overlap(self, place: int, start: int, part: memoryview) -> tuple[slice, slice]:
        """Where in a slot that begins at `place`, and where in `part` itself, are the bytes that they share."""
        low = max(start, place)
        high = max(low, min(start + len(part), place + self._capacity))
        return slice(low - place, high - place), slice(low - start, high - start)

    def abort(self) -> None:
        self._words[ABORTED] = 1

    def close(self) -> None:
        """Leave: to the peers it looks like a death. The memory goes with its last user."""
        if self._fd >= 0:
            _set_lock(self._fd, self.rank, fcntl.F_UNLCK)
            os.close(self._fd)
            self._fd = -1

    def _write(self, piece: torch.Tensor, length: int | None = None) -> tuple[torch.Tensor, ...]:
        """Show `piece` [n] to the others as the next exchange; returns all ranks' slots, [length or n] each."""
        self._wait_for_all()
        self._sequence += 1
        key = (piece.dtype, length or piece.numel())
        if key != self._views_key:
            self._views_key, self._views = key, self._make_views(*key)
        slots = self._views[self._sequence & 1]
        own = slots[self.rank] if length is None else slots[self.rank][: piece.numel()]
        own.copy_(piece)
        self._words[self._own_word] = self._sequence
        return slots

    def _make_views(self, dtype: torch.dtype, length: int) -> list[tuple[torch.Tensor, ...]]:
        """The first `length` elements of every slot, for each half. Kept: a layer is like the last."""
        data = self._memory[_header_bytes(self.size) :].view(dtype)
        halves = data.view(2, self.size, self._capacity // dtype.itemsize)[:, :, :length]
        return [half.unbind(0) for half in halves]

    def _wait_for_all(self) -> None:
        """Until every peer has written what this rank wrote last."""
        words, sequence = self._words, self._sequence
        if words[ABORTED]:
            raise ConnectionAbortedError("the group was aborted")
        for peer in self._peers:
            word = _sequence_word(peer)
            for _ in range(SPINS):
                if words[word] >= sequence:
                    break
            else:
                self._wait_patiently(peer, word)

    def _wait_patiently(self, peer: int, word: int) -> None:
        """Give the core away: there may be more ranks than cores, and the peer may be waiting for this one."""
        words, sequence = self._words, self._sequence
        start = checked = time.monotonic()
        while words[word] < sequence:
            if words[ABORTED]:
                raise ConnectionAbortedError("the group was aborted")
            now = time.monotonic()
            if now - start < YIELD_SECONDS:
                os.sched_yield()
                continue
            time.sleep(SLEEP_SECONDS)
            if now - checked > ALIVE_SECONDS:
                checked = now
                for other in self._peers:
                    # It may have written and left since the loop looked.
                    if not _is_locked(self._fd, other) and words[_sequence_word(other)] < sequence:
                        raise ConnectionResetError(f"rank {other} of the group died")
            if now - start > self._timeout:
                raise TimeoutError(f"rank {peer} of the group did not answer within {self._timeout:g} s")


def segment_bytes(size: int, capacity: int) -> int:
    return _header_bytes(size) + 2 * size * capacity


def _header_bytes(size: int) -> int:
    """Nonce, abort flag, sequence numbers: each on a line of its own."""
    return -(-(2 + size) * LINE // mmap.PAGESIZE) * mmap.PAGESIZE


def _sequence_word(rank: int) -> int:
    return (2 + rank) * WORDS_PER_LINE


def _add(slots: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
    """Sum them in order into `out`; short types are rounded once, at the end."""
    if len(slots) == 2 or out.itemsize >= 4:
        torch.add(slots[0], slots[1], out=out)
        for slot in slots[2:]:
            out.add_(slot)
        return
    total = slots[0].float()
    for slot in slots[1:]:
        total.add_(slot)
    out.copy_(total)


def _open(path: str, nonce: bytes) -> int | None:
    """The peer's segment, or None: another node, another container, another user."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    # In another PID namespace the path may lead to a stranger's file.
    try:
        if os.pread(fd, NONCE_BYTES, 0) == nonce:
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


# struct flock of Linux on 64 bits: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")


def _set_lock(fd: int, byte: int, kind: int) -> None:
    """Locks of the open file, not of the process: two ranks may share one."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _is_locked(fd: int, byte: int) -> bool:
    """Whether somebody else holds it."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK
