"""Sequences by some key, the lowest first, of which any may leave at any moment.

A heap in which leaving costs nothing: the entry stays behind until it comes up, or until such entries are the most.
"""

from __future__ import annotations

import heapq
import itertools

from qwen_ray.engine.sequence import Sequence

Entry = tuple[tuple[float, ...], int, Sequence]


class SequenceHeap:
    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._numbers = itertools.count()  # no two entries compare equal
        self._entry_of: dict[Sequence, int] = {}  # the number of each member's entry; other entries mean nothing

    def __len__(self) -> int:
        return len(self._entry_of)

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._entry_of

    def push(self, key: tuple[float, ...], seq: Sequence) -> None:
        number = next(self._numbers)
        self._entry_of[seq] = number
        heapq.heappush(self._entries, (key, number, seq))

    def first(self) -> Sequence | None:
        while self._entries:
            if self._is_member(self._entries[0]):
                return self._entries[0][2]
            heapq.heappop(self._entries)
        return None

    def discard(self, seq: Sequence) -> None:
        self._entry_of.pop(seq, None)
        if len(self._entries) > 2 * len(self._entry_of) + 16:
            self._entries = [entry for entry in self._entries if self._is_member(entry)]
            heapq.heapify(self._entries)

    def _is_member(self, entry: Entry) -> bool:
        return self._entry_of.get(entry[2]) == entry[1]
