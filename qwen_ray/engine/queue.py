"""Who runs next: by priority, then by what each tenant has been served, then by arrival.

Tenants share by tokens: the virtual token counter of Sheng et al. 2024 (Fairness in Serving Large Language Models).
Every token that a tenant is served, divided by its weight, adds to its counter, and the lowest counter goes first. Who
had nothing waiting is lifted to the lowest of those who have: nobody saves up by being idle. So of two tenants with
work waiting, what they have been served differs by no more than what the ranks hold at once, however long it lasts.

Sequences that have begun (preempted, back after a repair, handed over by another replica) come before all others of
their priority: somebody is reading them, and their tenants have paid for their turn. Only a light tenant's come before
those of a heavy one.

Knows who waits; nothing of blocks, ranks or steps. What is done often costs the logarithm of how many wait.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Callable

from qwen_ray.core.errors import Overloaded
from qwen_ray.core.room import Room
from qwen_ray.engine.sequence import Sequence
from qwen_ray.engine.sequence_heap import SequenceHeap

PROMPT_COST = 1.0  # of a token that is computed; those that a prefix hit saves cost nothing
OUTPUT_COST = 2.0  # the weights of Sheng et al., section 4.2

MAX_RETRY_AFTER = 60.0  # seconds


class Pace:
    """How long a request takes to make room for the next while there is work. Times in seconds, of one clock."""

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=64)
        self._last = 0.0

    def begin(self, now: float) -> None:
        """There is work, after there was none."""
        self._last = now

    def end(self, now: float) -> None:
        """A request that ran has ended."""
        self._gaps.append(now - self._last)
        self._last = now

    @property
    def seconds_each(self) -> float:
        return sum(self._gaps) / len(self._gaps) if self._gaps else 0.0


class _Tenant:
    """One tenant within one priority."""

    __slots__ = ("counter", "is_ranked", "num_sequences", "waiting")

    def __init__(self) -> None:
        self.counter = 0.0
        self.is_ranked = False
        self.num_sequences = 0  # known, waiting or not
        self.waiting = SequenceHeap()  # those that have not begun, by turn


class _Priority:
    """The tenants of one priority, which are fair among themselves."""

    def __init__(self) -> None:
        self.num_sequences = 0  # known, waiting or not
        self.begun = SequenceHeap()  # by turn
        self.tenants: dict[str, _Tenant] = {}
        # Who has somebody waiting, by counter; of equals first those with nothing else here. Counters only grow, so
        # an entry may lag behind, but never runs ahead.
        self._ranking: list[tuple[float, bool, int, _Tenant]] = []
        self._num_ranked = 0
        self._last = _Tenant()  # the last to have had a turn

    def know(self, tenant: str) -> None:
        self.num_sequences += 1
        self.tenants.setdefault(tenant, _Tenant()).num_sequences += 1

    def forget(self, tenant: str) -> None:
        self.num_sequences -= 1
        self.tenants[tenant].num_sequences -= 1

    def push(self, seq: Sequence) -> None:
        tenant = self.tenants[seq.request.tenant]
        if not tenant.waiting:
            lowest = self._least_served() or self._last
            tenant.counter = max(tenant.counter, lowest.counter)
        tenant.waiting.push(seq.turn, seq)
        if not tenant.is_ranked:
            tenant.is_ranked = True
            self._num_ranked += 1
            heapq.heappush(self._ranking, (tenant.counter, tenant.num_sequences > 1, self._num_ranked, tenant))

    def remove(self, seq: Sequence) -> None:
        self._last = self.tenants[seq.request.tenant]
        self._last.waiting.discard(seq)

    def first(self, is_light: Callable[[Sequence], bool]) -> Sequence | None:
        begun, tenant = self.begun.first(), self._least_served()
        new = tenant.waiting.first() if tenant else None
        if begun and new and is_light(new) and not is_light(begun):
            return new
        return begun or new

    def _least_served(self) -> _Tenant | None:
        while self._ranking:
            counter, _, number, tenant = self._ranking[0]
            if not tenant.waiting:
                tenant.is_ranked = False
                heapq.heappop(self._ranking)
            elif counter < tenant.counter:
                heapq.heapreplace(self._ranking, (tenant.counter, tenant.num_sequences > 1, number, tenant))
            else:
                return tenant
        return None


class Queue:
    """`limit`: how many sequences that have not begun may wait; see `check_room`."""

    def __init__(self, limit: int) -> None:
        self.num_tokens = 0  # of those that wait
        self.num_refused = 0
        self.pace = Pace()
        self._num_waiting = 0
        self._by_priority: dict[int, _Priority] = {}
        self._priorities: list[int] = []  # in order
        self._new = Room(limit)  # of those that wait, those that have not begun

    def __len__(self) -> int:
        return self._num_waiting

    def check_room(self, tenant: str) -> None:
        """Raises Overloaded if no more of this tenant's may wait."""
        if not self._new.has_place(tenant):
            self.num_refused += 1
            seconds = min(MAX_RETRY_AFTER, max(1.0, self.pace.seconds_each * (len(self) + 1)))
            raise Overloaded(f"{len(self)} requests are waiting, which is the limit.", retry_after=seconds)

    def know(self, seq: Sequence) -> None:
        """Keep its tenant's account from now on, until `forget`."""
        priority = seq.request.priority
        if priority not in self._by_priority:
            self._by_priority[priority] = _Priority()
            insort(self._priorities, priority)
        self._by_priority[priority].know(seq.request.tenant)

    def forget(self, seq: Sequence) -> None:
        """It has ended. Accounts of a priority at which nothing is left mean nothing any more."""
        priority = seq.request.priority
        self._by_priority[priority].forget(seq.request.tenant)
        if not self._by_priority[priority].num_sequences:
            del self._by_priority[priority]
            self._priorities.remove(priority)

    def push(self, seq: Sequence) -> None:
        """Let a known sequence wait."""
        peers = self._by_priority[seq.request.priority]
        if seq.has_begun:
            peers.begun.push(seq.turn, seq)
        else:
            peers.push(seq)
            self._new.enter(seq.request.tenant)
        self._num_waiting += 1
        self.num_tokens += seq.num_tokens

    def first(self, is_light: Callable[[Sequence], bool] = lambda _: False) -> Sequence | None:
        """`is_light`: whether its tenant has little on the ranks, and so made others go who have begun."""
        for priority in self._priorities:
            if seq := self._by_priority[priority].first(is_light):
                return seq
        return None

    def remove(self, seq: Sequence) -> None:
        """It waits no longer, be it that its turn has come or that it has ended."""
        peers = self._by_priority[seq.request.priority]
        if seq in peers.begun:
            peers.begun.discard(seq)
        else:
            peers.remove(seq)
            self._new.leave(seq.request.tenant)
        self._num_waiting -= 1
        self.num_tokens -= seq.num_tokens

    def charge(self, seq: Sequence, cost: float) -> None:
        """Its tenant has been served."""
        request = seq.request
        self._by_priority[request.priority].tenants[request.tenant].counter += cost / request.weight
