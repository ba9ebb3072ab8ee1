"""A process that tries grammars for others, each in a fork of its own that may die of it.

Its connection is a socket that it inherits. It is sent a kind and a text, and answers with what is wrong with it or
None, and the text as ranks are to be told it. Its first message says whether there is a vocabulary at all. Knows one
model's vocabulary; nothing of requests.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from qwen_ray.core.errors import CheckpointError, RequestError, RequestFailed
from qwen_ray.core.request import Grammar
from qwen_ray.grammar.lark import from_gbnf
from qwen_ray.grammar.matcher import GrammarCompiler, Matcher

CPU_SECONDS = 0.75  # for one grammar
NUM_TRIALS, TRIAL_TOKENS = 2, 32
MEMORY = 2**30  # bytes for one grammar
NICENESS = 5  # streams go first

Verdict = tuple[str | None, str]


def tried(compiler: GrammarCompiler, grammar: Grammar) -> Verdict:
    """What is wrong with it, and its text in the form that costs ranks least.

    A few texts are begun, at random but always the same: much of what is too much shows only there.
    """
    try:
        text = from_gbnf(grammar.text) if grammar.kind == "grammar" else grammar.text
        grammar = Grammar(kind=grammar.kind, text=text)
        chance = random.Random(0)
        for _ in range(NUM_TRIALS):
            _begin(compiler.matcher(grammar), chance)
    except RequestFailed as error:
        return f"cannot be followed: {error.message}", ""
    except RequestError as error:
        return error.message, ""
    return None, text


def _begin(matcher: Matcher, chance: random.Random) -> None:
    for _ in range(TRIAL_TOKENS):
        bits, _ = matcher.allowed()
        start = chance.randrange(len(bits))
        some = next((i for i in (*range(start, len(bits)), *range(start)) if bits[i]), None)
        if some is None:
            return
        matcher.add([some * 8 + chance.choice([bit for bit in range(8) if bits[some] >> bit & 1])])


def in_a_fork(work: Callable[[], Verdict]) -> Verdict:
    """`work` within the limits of this module."""
    read_end, write_end = os.pipe()
    process = os.fork()
    if process == 0:
        with contextlib.suppress(BaseException):
            _limit()
            with open(write_end, "wb") as answers:
                answers.write(json.dumps(work()).encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as answers:
        answer = answers.read()
    os.waitpid(process, 0)
    if not answer:
        return "takes too much work.", ""
    error, text = json.loads(answer)
    return error, text


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # ends the process


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    path, load_format, vocab_size = sys.argv[2:]
    os.nice(NICENESS)
    try:
        compiler = GrammarCompiler.load(Path(path), load_format, int(vocab_size))
    except CheckpointError as error:
        connection.send((str(error), ""))
        return
    connection.send((None, ""))
    with contextlib.suppress(EOFError):  # whoever asks is gone
        while True:
            kind, text = connection.recv()
            grammar = Grammar(kind=kind, text=text)
            connection.send(in_a_fork(lambda grammar=grammar: tried(compiler, grammar)))


if __name__ == "__main__":
    main()
