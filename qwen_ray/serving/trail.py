"""When one HTTP request was where, and on which replicas: for its line in the log and its trace.

Filled in by those who know (the dispatcher, the clock of an answer), read once at the end. Knows no tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A part of a request's time; seconds since the epoch."""

    name: str  # ingress, queue, prefill, decode, respond
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A sequence was handed to another replica, or back to the same one."""

    time: float
    replica: str


@dataclass(slots=True, kw_only=True)
class Trail:
    """Seconds since the epoch, 0.0 for what has not been. Of several sequences the first, of last tokens the last."""

    dispatched: float = 0.0
    scheduled: float = 0.0  # by the replica's clock
    first_token: float = 0.0
    last_token: float = 0.0
    num_cached_tokens: int = 0
    replicas: dict[str, None] = field(default_factory=dict[str, None])  # a set that keeps its order
    moves: list[Move] = field(default_factory=list[Move])

    def placed(self, replica: str, *, is_move: bool) -> None:
        self.replicas[replica] = None
        if is_move:
            self.moves.append(Move(time=time.time(), replica=replica))

    def was_dispatched(self) -> None:
        self.dispatched = self.dispatched or time.time()

    def was_scheduled(self, at: float) -> None:
        self.scheduled = self.scheduled or at

    def had_tokens(self, first: float, last: float) -> None:
        self.first_token = min(self.first_token or first, first)
        self.last_token = max(self.last_token, last)

    def segments(self, begun: float, ended: float) -> Iterator[Segment]:
        """One after the other without a gap from `begun` to `ended`, as far as it came.

        A replica's clock may differ from ours: what it says is kept between what was before and after.
        """
        first = self.first_token or ended
        scheduled = min(self.scheduled, first) if self.scheduled else 0.0
        # Where each begins; the last one lasts until the end.
        starts = {
            "ingress": begun,
            "queue": self.dispatched,
            "prefill": scheduled,
            "decode": self.first_token,
            "respond": self.last_token,
        }
        names = [name for name, start in starts.items() if start]
        at = begun
        for name, following in zip(names, [*names[1:], ""], strict=True):
            end = min(max(starts[following], at), ended) if following else max(ended, at)
            yield Segment(name=name, start=at, end=end)
            at = end
