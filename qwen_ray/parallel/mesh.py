"""A tensor group of CPU ranks that share no memory: TCP links between every two of them.

Sums and gathers go through rank 0, which adds up and hands out: so all get the same bits. Rows go from rank to rank.

A rank may be waiting for one peer when another dies. So every two ranks have a second link, on which nothing is said
but goodbye, and a thread listens to those: the end of one without a goodbye ends everything at once.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch

from qwen_ray.parallel.board import Board
from qwen_ray.parallel.link import Link, Listener, connect, wait_for_loss


class Mesh:
    """A TensorGroup. Not thread-safe, `abort` excepted; raises OSError when a peer dies, hangs or aborts."""

    def __init__(self, rank: int, links: Mapping[int, Link], alarms: Sequence[Link]) -> None:
        """`links`: to every other rank; `alarms`: likewise, those on which nothing is said."""
        self.rank = rank
        self.size = len(links) + 1
        self._links = links
        self._alarms = alarms
        self._watch = threading.Thread(target=self._abort_on_loss, name="mesh-watch", daemon=True)
        self._watch.start()

    @classmethod
    def join(cls, board: Board, rank: int, size: int, address: str, timeout: float) -> Mesh:
        """Meet the other ranks through `board`; `address` is where they reach this one."""
        with ExitStack() as opened:
            links = link_all(board, "link", rank, size, address, timeout, opened)
            alarms = link_all(board, "alarm", rank, size, address, timeout, opened)
            opened.pop_all()
        return cls(rank, links, list(alarms.values()))

    def _abort_on_loss(self) -> None:
        if wait_for_loss(self._alarms):
            self.abort()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:
            return x
        x = x.contiguous()
        if self.rank != 0:
            self._links[0].send(x)
            return self._links[0].receive(x)
        total = x.float() if x.itemsize < 4 else x.clone()  # short types are rounded once, at the end
        for link in self._links.values():
            total += link.receive(torch.empty_like(x))
        total = total.to(x.dtype)
        for link in self._links.values():
            link.send(total)
        return total

    def gather(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        if self.rank != 0:
            self._links[0].send(x)
            return None
        parts = [link.receive(x.new_empty(x.shape[0], sizes[peer])) for peer, link in self._links.items()]
        return torch.cat([x, *parts], dim=-1)

    def all_to_all(self, x: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """Pair by pair, one of the two speaking at a time, all ranks in the same order of pairs.

        In turn t, the ranks a and b with a + b = t modulo the size are a pair. Of the pairs that are not done, the
        earliest has both of its ranks there: no deadlock, however little the system buffers.
        """
        parts = list(x.split(list(counts)))
        for turn in range(self.size):
            peer = (turn - self.rank) % self.size
            if peer == self.rank:
                continue
            if self.rank < peer:
                self._tell(peer, parts[peer])
                parts[peer] = self._hear(peer, x)
            else:
                heard = self._hear(peer, x)
                self._tell(peer, parts[peer])
                parts[peer] = heard
        return torch.cat(parts), [len(part) for part in parts]

    def _tell(self, peer: int, rows: torch.Tensor) -> None:
        self._links[peer].send(torch.tensor([len(rows)]))
        self._links[peer].send(rows)

    def _hear(self, peer: int, like: torch.Tensor) -> torch.Tensor:
        """Rows of the shape and type that `like` has."""
        count = int(self._links[peer].receive(torch.empty(1, dtype=torch.int64)))
        return self._links[peer].receive(like.new_empty(count, *like.shape[1:]))

    def abort(self) -> None:
        # Alarms first: whoever wakes up from a link may close this, and would still say goodbye.
        for link in (*self._alarms, *self._links.values()):
            link.abort()

    def close(self) -> None:
        """Leave: peers that still want something of this rank fail."""
        for alarm in self._alarms:
            alarm.say_goodbye()
        for alarm in self._alarms:
            alarm.abort()  # ends the watch
        self._watch.join()
        for link in (*self._links.values(), *self._alarms):
            link.close()


def link_all(
    board: Board, name: str, rank: int, size: int, address: str, timeout: float, opened: ExitStack
) -> dict[int, Link]:
    """A link to every other rank, by rank. `opened` closes those that there are, should one fail."""

    def keep(link: Link) -> Link:
        opened.callback(link.close)
        return link

    listeners = {peer: Listener(board, f"{name}{rank}-{peer}", address) for peer in range(rank + 1, size)}
    for listener in listeners.values():
        opened.callback(listener.close)
    links = {peer: keep(connect(board, f"{name}{peer}-{rank}", timeout)) for peer in range(rank)}
    return links | {peer: keep(listener.accept(timeout)) for peer, listener in listeners.items()}
