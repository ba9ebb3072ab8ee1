"""What the readers of all syntaxes of calls have in common: text comes in pieces, and what is read does not depend on
them. Knows the tags around a call, nothing of what stands between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
MAX_HEAD = 4096  # characters in which a call must show that it is one: text before that is held back


class CallReader(ABC):
    """Reads one call, its opening tag included. Whether it is one is known when it has a `name`.

    Each step of a syntax reads what it can of a text, says in `_read` which one goes on (None: the call has ended), and
    returns what is left; or it keeps that with `_hold`, until more of it has come.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_whole = False  # its arguments have been written to their end
        self._read: Callable[[str], str | None] | None = self._read_head
        self._gained = ""  # by the arguments
        self._held = ""

    def push(self, text: str) -> str | None:
        """Reads on. What follows the call once it has ended (all of the text if it is none), None until then."""
        rest: str | None = self._held + text
        self._held = ""
        while rest is not None and self._read is not None:
            rest = self._read(rest)
        return rest

    def finish(self) -> str:
        """Nothing follows: the text of what did not become a call."""
        held, self._held = self._held, ""
        if self.name is None:
            return held
        self._break_off(held)
        return ""

    def take(self) -> str:
        """What the arguments have gained since the last time."""
        gained, self._gained = self._gained, ""
        return gained

    def _hold(self, text: str) -> None:
        self._held = text

    @abstractmethod
    def _read_head(self, text: str) -> str | None:
        """The first step: up to the name."""

    @abstractmethod
    def _break_off(self, held: str) -> None:
        """A call ends in the middle; `held` was the last of it."""
