"""What ranks write on for each other before they are connected: names and values, in a store that all of them reach.

Knows how to wait: until a value is there, until time is up, or until another thread says that there is no use.
"""

from __future__ import annotations

import threading
import time

from torch._C._distributed_c10d import PrefixStore, Store

POLL_SECONDS = 0.001


class Wait:
    """How long a rank waits for the others, whatever it waits for. `abort` is for other threads."""

    def __init__(self, seconds: float) -> None:
        """`seconds`, from now."""
        self._deadline = time.monotonic() + seconds
        self._is_aborted = threading.Event()

    @property
    def is_aborted(self) -> bool:
        return self._is_aborted.is_set()

    def abort(self) -> None:
        self._is_aborted.set()

    def pause(self) -> None:
        """Between two looks. Raises TimeoutError when time is up, ConnectionAbortedError after `abort`."""
        if self.is_aborted:
            raise ConnectionAbortedError("the meeting of the ranks was aborted")
        if time.monotonic() > self._deadline:
            raise TimeoutError("not all ranks came to their meeting in time")
        time.sleep(POLL_SECONDS)


class Board:
    """A store that is waited at with patience, and not longer."""

    def __init__(self, store: Store, wait: Wait) -> None:
        self.store = store
        self.wait = wait

    def part(self, name: str) -> Board:
        """Names of their own on the same board."""
        return Board(PrefixStore(name, self.store), self.wait)

    def set(self, name: str, value: str) -> None:
        self.store.set(name, value)

    def get(self, name: str) -> bytes:
        """The value, as soon as somebody has set it."""
        while not self.store.check([name]):
            self.wait.pause()
        return self.store.get(name)
