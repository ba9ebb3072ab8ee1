"""Where one sequence stands: in its thinking, or in its grammar; and which tokens may come next.

A function of the tokens so far, taken in one by one: a sequence that comes back is replayed from its first. Knows
token ids, and with which of them a text may end; nothing of logits.

A text ends where its grammar is complete. Before `min_tokens`, and with `ignore_eos`, only where nothing else is left.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from qwen_ray.core.errors import RequestFailed
from qwen_ray.core.request import SamplingParams
from qwen_ray.grammar.matcher import Matcher
from qwen_ray.worker.thinking import ThinkingBudget


class GrammarPlace:
    """How far one sequence is: in its thinking, or in its grammar. `num_seen` tokens of the output are taken in."""

    __slots__ = ("_matcher", "_num_bytes", "_sampling", "_thinking", "num_seen")

    def __init__(self, matcher: Matcher, sampling: SamplingParams, num_bytes: int) -> None:
        assert sampling.grammar is not None
        self._matcher = matcher
        self._sampling = sampling
        self._num_bytes = num_bytes
        self._thinking: ThinkingBudget | None = None  # None: the grammar has begun
        if sampling.grammar.after_thinking and sampling.thinking is not None:
            budget = sys.maxsize if sampling.thinking_budget is None else sampling.thinking_budget
            self._thinking = ThinkingBudget(sampling.thinking, budget)
        self.num_seen = 0

    def add(self, token_ids: Sequence[int]) -> None:
        """Raises RequestFailed."""
        start = 0
        while self._thinking is not None and start < len(token_ids):
            was_open = self._thinking.is_open
            self._thinking.add(token_ids[start : start + 1])
            if not self._thinking.is_open:  # a block has ended, or none has begun
                self._thinking = None
            start += was_open or self._thinking is not None
        self.num_seen += len(token_ids)
        self._matcher.add(token_ids[start:])

    def mask(self, stops: Sequence[int]) -> bytearray:
        """One bit for each token id, lowest first. Raises RequestFailed where nothing is allowed."""
        sampling = self._sampling
        is_short = self.num_seen < sampling.min_tokens
        if self._thinking is not None and self._thinking.is_open:
            # An answer that ends within its thinking would not match.
            ends = stops if is_short else [token for token in stops if token not in sampling.stop_token_ids]
            return _without(bytearray(b"\xff") * self._num_bytes, ends)
        bits, is_complete = self._matcher.allowed()
        if self._thinking is not None:
            _allow(bits, [self._thinking.start_id])
        if is_short and not _is_empty(others := _without(bits[:], stops)):
            return others
        if is_complete and not (sampling.ignore_eos and not _is_empty(bits)):
            _allow(bits, stops)
        if _is_empty(bits):
            raise RequestFailed("it is complete, and there is no token to end it with.")
        return bits


def _allow(bits: bytearray, token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        if token_id >> 3 < len(bits):
            bits[token_id >> 3] |= 1 << (token_id & 7)


def _without(bits: bytearray, token_ids: Iterable[int]) -> bytearray:
    for token_id in token_ids:
        if token_id >> 3 < len(bits):
            bits[token_id >> 3] &= ~(1 << (token_id & 7))
    return bits


def _is_empty(bits: bytearray) -> bool:
    return bits.count(0) == len(bits)
