"""Which sequences may be what kills the ranks, and whose turn it is while there are such.

When ranks die, nobody says which of the sequences in flight did it, so all are blamed. Progress clears a sequence. One
that is blamed twice without any is set aside: it runs in steps of its own, with nothing else in flight, and in between
the others have theirs. If the ranks die then, it has done it. Of several that are set aside the first runs, until it
is cleared or has ended.

Ranks may also be killed by what has nothing to do with any sequence, again and again. So that none gets far by bad luck
alone, those that are blamed come back a few at a time, whose steps are short: they are cleared before the next blow.

Knows who is blamed; that the dead are replaced and their sequences wait again is the scheduler's.
"""

from __future__ import annotations

from qwen_ray.engine.sequence import Sequence

MAX_DEATHS_IN_COMPANY = 2
MAX_BLAMED_TOGETHER = 4  # on the ranks, beside those that are not
# Tokens beyond those it had at its last death. Coming back gives a sequence one, from a prefill; a second is the first
# of a step such as the one that killed.
PROGRESS = 2


class Suspects:
    """`depth`: steps that the others have for each one of a suspect."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._set_aside: dict[Sequence, None] = {}
        self._num_steps_of_others = 0
        self.has_room = True  # for the first; until there is, none of the others may come in

    def __len__(self) -> int:
        return len(self._set_aside)

    @property
    def first(self) -> Sequence | None:
        return next(iter(self._set_aside), None)

    @property
    def num_waiting_tokens(self) -> int:
        return sum(seq.num_tokens for seq in self._set_aside if not seq.is_on_ranks)

    @property
    def is_turn_of_others(self) -> bool:
        return self._num_steps_of_others < self._depth

    def begin_turn(self, *, of_others: bool) -> None:
        self._num_steps_of_others = self._num_steps_of_others + 1 if of_others else 0

    def blame(self, seq: Sequence, num_deaths: int = 1) -> None:
        """Ranks have died under it; it may be set aside from here on."""
        seq.num_deaths += num_deaths
        seq.cleared_at = seq.num_tokens + PROGRESS
        if seq.num_deaths >= MAX_DEATHS_IN_COMPANY:
            seq.is_set_aside = True
            self._set_aside[seq] = None

    def clear(self, seq: Sequence) -> None:
        """Nothing is held against it any more, or it has ended."""
        seq.num_deaths = 0
        seq.is_set_aside = False
        if seq in self._set_aside:
            del self._set_aside[seq]
            self.has_room = True
