"""How long a step may take before its ranks count as stuck, learned from the steps that they have run.

A limit in seconds that suits a GPU declares a large model on a CPU dead in its first long prompt, and one that suits
that prompt lets a GPU hang for minutes. So it follows the tokens in flight: per token, a step of many takes no longer
than one of few.
"""

from __future__ import annotations

from collections import deque

AT_LEAST = 8.0  # with the time that it takes to tell, a hang is seen from outside within 10 s
UNKNOWN = 120.0  # before the first step
TIMES = 5.0
FORGET = 0.98  # a step that was slow for a reason of its own counts less and less


class Patience:
    def __init__(self, depth: int = 1) -> None:
        """`depth`: steps in flight."""
        self._sizes: deque[int] = deque(maxlen=depth)
        self._slowest: dict[int, float] = {}  # seconds, by the bit length of the number of tokens

    def expect(self, num_tokens: int) -> None:
        """A step of that many is under way."""
        self._sizes.append(num_tokens.bit_length())

    def learn(self, num_tokens: int, seconds: float) -> None:
        size = num_tokens.bit_length()
        self._slowest[size] = max(seconds, FORGET * self._slowest.get(size, 0.0))

    @property
    def seconds(self) -> float:
        """For the largest of the steps in flight."""
        if not self._slowest:
            return UNKNOWN
        return max(AT_LEAST, TIMES * self._estimate(max(self._sizes, default=0)))

    def _estimate(self, size: int) -> float:
        smaller = [known for known in self._slowest if known <= size]
        if not smaller:
            return self._slowest[min(self._slowest)]
        nearest = max(smaller)
        return max(self._slowest[nearest] * 2 ** (size - nearest), *(self._slowest[known] for known in smaller))
