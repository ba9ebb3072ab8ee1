"""Whether a grammar can be used, found out in another process: `check_process.py`.

Knows processes, and what was found out before; nothing of vocabularies. Nothing here blocks an event loop.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from qwen_ray.core.errors import InvalidRequest, NotReady, Overloaded
from qwen_ray.core.request import Grammar

MAX_KNOWN = 256  # grammars
MAX_WAITING = 64  # checks
START_SECONDS = 60.0
CHECK_SECONDS = 10.0  # by the clock; the process counts its own time, and gives up long before


class GrammarChecker:
    """For the model at `path`. Its process starts with the first check, or with `start`."""

    def __init__(self, path: Path, load_format: str, vocab_size: int) -> None:
        self._process = _CheckProcess((str(path.absolute()), load_format, str(vocab_size)))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar-checks")
        self._known: OrderedDict[Grammar, Grammar | str] = OrderedDict()
        self._num_waiting = 0

    async def check(self, grammar: Grammar) -> Grammar:
        """The same, as ranks are to be told it. Raises InvalidRequest, Overloaded, NotReady."""
        key = replace(grammar, after_thinking=False)
        verdict = self._known.pop(key, None)
        if verdict is None:
            verdict = await self._ask(key)
        self._known[key] = verdict
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        if isinstance(verdict, str):
            raise InvalidRequest(verdict, param="structured_outputs")
        return replace(verdict, after_thinking=grammar.after_thinking)

    def start(self) -> None:
        """So that the first check need not wait; it hears of what goes wrong with it."""
        self._thread.submit(self._process.start)

    async def close(self) -> None:
        await asyncio.wrap_future(self._thread.submit(self._process.stop))
        self._thread.shutdown()

    async def _ask(self, grammar: Grammar) -> Grammar | str:
        if self._num_waiting >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} grammars are being checked here.", retry_after=1.0)
        self._num_waiting += 1
        try:
            return await asyncio.wrap_future(self._thread.submit(self._try, grammar))
        finally:
            self._num_waiting -= 1

    def _try(self, grammar: Grammar) -> Grammar | str:
        error, text = self._process.ask((grammar.kind, grammar.text))
        if error is not None:
            return error
        try:
            return replace(grammar, text=text)
        except InvalidRequest as too_long:  # once it is converted
            return too_long.message


class _CheckProcess:
    """Started when it is needed, and again when it has died. Calls block."""

    def __init__(self, arguments: tuple[str, ...]) -> None:
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def ask(self, question: tuple[str, str]) -> tuple[str | None, str]:
        """Raises NotReady."""
        self.start()
        assert self._connection is not None
        try:
            self._connection.send(question)
            return self._answer(CHECK_SECONDS)
        except (OSError, EOFError) as error:  # TimeoutError is one
            self.stop()
            raise NotReady("The grammar could not be checked; try again.") from error

    def start(self) -> None:
        """Raises NotReady."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "qwen_ray.grammar.check_process", str(theirs.fileno()), *self._arguments]
            self._process = subprocess.Popen(
                command,
                cwd=Path(__file__).parents[2],  # it finds this package there, however it came to be found here
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())
        try:
            error, _ = self._answer(START_SECONDS)
        except (OSError, EOFError) as failure:
            error = f"its process did not start ({type(failure).__name__})"
        if error is not None:
            self.stop()
            raise NotReady(f"Grammars cannot be checked here: {error}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _answer(self, seconds: float) -> tuple[str | None, str]:
        assert self._connection is not None
        if not self._connection.poll(seconds):
            raise TimeoutError
        return self._connection.recv()
