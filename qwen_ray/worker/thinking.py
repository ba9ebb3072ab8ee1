"""How much a sequence has thought, and what its budget makes it say next.

A function of the prompt's end and the tokens since, taken in one by one: a sequence that comes back, replayed from its
first token, goes on at the same place of the same ending. Knows ids; nothing of logits.
"""

from __future__ import annotations

from collections.abc import Iterable

from qwen_ray.core.request import Thinking


class ThinkingBudget:
    """`num_seen` tokens of the output are taken in. `forced` is the next token if it is not the model's to choose."""

    __slots__ = ("_is_open", "_left", "_num_said", "_thinking", "num_seen")

    def __init__(self, thinking: Thinking, budget: int) -> None:
        self._thinking = thinking
        self._left = budget  # tokens that may still be thought; tags are none
        self._is_open = thinking.starts_open
        self._num_said = 0  # tokens of the ending
        self.num_seen = 0

    @property
    def is_open(self) -> bool:
        """Whether the next token belongs to a block, or to its ending."""
        return self._is_open

    @property
    def start_id(self) -> int:
        return self._thinking.start_id

    @property
    def forced(self) -> int | None:
        return self._thinking.ending[self._num_said] if self._is_open and self._left <= 0 else None

    def add(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            self.num_seen += 1
            if self.forced is not None:
                self._num_said += 1
                if self._num_said == len(self._thinking.ending):
                    self._is_open, self._num_said = False, 0
            elif not self._is_open:
                self._is_open = token_id == self._thinking.start_id
            elif token_id == self._thinking.end_id:
                self._is_open = False
            else:
                self._left -= 1
