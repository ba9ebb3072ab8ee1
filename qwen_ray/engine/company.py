"""Who computes beside a light tenant, and how much: what a step holds, all in it wait for.

Where a step with many sequences takes several times as long as one with few (on a CPU; hardly on a GPU), a tenant that
asks now and then would feel what another one has piled up. So a step with a light tenant in it holds only as many
tokens of others as make it `slowdown` times as long, and those take turns. Knows sizes, times and who belongs to whom;
nothing of blocks or ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter

from qwen_ray.engine.sequence import Sequence

OTHERS = 4  # have at least one token in a light tenant's step for every so many of its own
# Weights of the newest step in the mean. What else runs on a machine makes steps longer, never shorter.
OF_SHORTER, OF_LONGER = 0.5, 0.01

Party = tuple[int, str]  # a priority and a tenant


def party(seq: Sequence) -> Party:
    return seq.request.priority, seq.request.tenant


class StepTimes:
    """What steps have taken, by their number of tokens, and so which are at most `slowdown` times as long as others."""

    def __init__(self, slowdown: float) -> None:
        self._slowdown = slowdown
        self._seconds: dict[int, float] = {}  # the mean, of steps with more than half of 2**key tokens, and at most all

    def took(self, num_tokens: int, seconds: float) -> None:
        if seconds <= 0:
            return
        size = _size(num_tokens)
        before = self._seconds.get(size, seconds)
        self._seconds[size] = before + (OF_SHORTER if seconds < before else OF_LONGER) * (seconds - before)

    def most(self, num_tokens: int) -> int | None:
        """Tokens of the largest step that takes no more than `slowdown` times one of `num_tokens`; None: any.

        Sizes that have not been seen are found out on the way: down to the smallest by halves, then between the
        largest that is known to do and the smallest that is known not to.
        """
        size = _size(num_tokens)
        known = sorted(other for other in self._seconds if other >= size)
        if not known:
            return None
        if known[0] > size:
            return 2 ** (known[0] - 1)
        longest = self._slowdown * min(self._seconds[other] for other in known)
        for shorter, longer in pairwise(known):
            if self._seconds[longer] > longest:
                return 2 ** ((shorter + longer) // 2)
        return None


def _size(num_tokens: int) -> int:
    return (num_tokens - 1).bit_length()


@dataclass(frozen=True, slots=True, kw_only=True)
class Company:
    """Of one step: whose tenants are light in it, and how many tokens others may have."""

    light: frozenset[Party] = frozenset()
    num_tokens: int  # of all
    num_others: int = 0

    def decodes(self, ready: list[Sequence], share: int) -> list[Sequence]:
        """At most `share` of those `ready` for their next token, in the same order."""
        if not self.light:
            return ready[:share]
        light = [seq for seq in ready if party(seq) in self.light]
        others = sorted((seq for seq in ready if party(seq) not in self.light), key=attrgetter("last_step"))
        chosen = set((light + others[: self.num_others])[:share])
        return [seq for seq in ready if seq in chosen]

    def prefills(self, ready: list[Sequence]) -> list[Sequence]:
        """Light tenants' first."""
        return sorted(ready, key=lambda seq: party(seq) not in self.light) if self.light else ready


class Shares:
    """How many sequences of each party run. Light are those with less than half of an even share, and none more urgent
    than they are."""

    def __init__(self) -> None:
        self._counts: Counter[Party] = Counter()  # above 0

    @property
    def num_parties(self) -> int:
        return len(self._counts)

    def came(self, seq: Sequence) -> None:
        self._counts[party(seq)] += 1

    def left(self, seq: Sequence) -> None:
        of = party(seq)
        self._counts[of] -= 1
        if not self._counts[of]:
            del self._counts[of]

    def clear(self) -> None:
        self._counts.clear()

    def is_light(self, seq: Sequence) -> bool:
        """Whether its party is, or would be with it."""
        own = self._counts[party(seq)] + (not seq.is_on_ranks)
        total = self._counts.total() + (not seq.is_on_ranks)
        num_parties = len(self._counts.keys() | {party(seq)})
        is_urgent = all(seq.request.priority <= priority for priority, _ in self._counts)
        return is_urgent and num_parties > 1 and 2 * own * num_parties <= total

    def company(self, running: Iterable[Sequence], coming: Sequence | None, times: StepTimes, limit: int) -> Company:
        """Of the next step, of at most `limit` tokens, with `coming` next in the queue."""
        if len(self._counts.keys() | ({party(coming)} if coming else set[Party]())) < 2:
            return Company(num_tokens=limit)
        there = [*running, coming] if coming else list(running)
        light = frozenset(of for of, seq in {party(seq): seq for seq in there}.items() if self.is_light(seq))
        num_light = sum(seq.num_uncomputed for seq in there if party(seq) in light)
        most = times.most(num_light) if num_light else None
        if most is None:
            return Company(num_tokens=limit)
        num_others = max(most - num_light, num_light // OTHERS, 1)
        return Company(light=light, num_tokens=min(limit, num_light + num_others), num_others=num_others)
