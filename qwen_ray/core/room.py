"""Room for so many, of which no tenant can take all."""

from __future__ import annotations


class Room:
    """How many are in it, in all and of each tenant."""

    def __init__(self, limit: int) -> None:
        self.count = 0
        self._limit = limit
        self._count_of: dict[str, int] = {}  # above 0

    def has_place(self, tenant: str) -> bool:
        """Whether one more of this tenant's may come in.

        Up to the limit there is room for all. Beyond, there still is for those with less than an even share of the
        limit, so that nobody fills it for the others; at twice the limit there is none.
        """
        if self.count < self._limit:
            return True
        own = self._count_of.get(tenant, 0)
        num_tenants = len(self._count_of) + (own == 0)
        return own * num_tenants < self._limit and self.count < 2 * self._limit

    def enter(self, tenant: str) -> None:
        self.count += 1
        self._count_of[tenant] = self._count_of.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        self.count -= 1
        self._count_of[tenant] -= 1
        if not self._count_of[tenant]:
            del self._count_of[tenant]
