"""Whose request is next to be worked on, where the work of one blocks all others."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """One at a time is let through, tenant by tenant, each time that the event loop has looked round.

    So who comes beside a thousand of another tenant waits for one or two of them. Lives on one event loop.
    """

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # tenants in the order of their turns

    async def next(self, tenant: str) -> None:
        """Returns when it is one's turn."""
        loop = asyncio.get_running_loop()
        if not self._is_taken:
            self._is_taken = True
            loop.call_soon(self._pass_on)
            return
        turn = loop.create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        await turn

    def _pass_on(self) -> None:
        while self._waiting:
            tenant = next(iter(self._waiting))
            line = self._waiting.pop(tenant)
            turn = line.popleft()
            if line:
                self._waiting[tenant] = line  # behind the others
            if not turn.done():  # by being cancelled
                turn.set_result(None)
                asyncio.get_running_loop().call_soon(self._pass_on)
                return
        self._is_taken = False
