"""Where the experts of one layer lie, and what has to travel when they are to lie elsewhere.

Pure arithmetic, the same on every rank: nobody is asked. Knows no weights and no communication.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

Slots = tuple[tuple[int, ...], ...]  # by expert rank: the ids of the experts in its slots


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMap:
    """A place is a number: `expert rank * width + slot`."""

    slots: Slots
    width: int  # slots of the expert rank that has most
    places: torch.Tensor  # [E, most copies]; an expert with fewer copies has its own repeated
    num_copies: torch.Tensor  # [E]

    @classmethod
    def of(cls, slots: Slots, num_experts: int, device: torch.device) -> ExpertMap:
        width = max(map(len, slots))
        copies: list[list[int]] = [[] for _ in range(num_experts)]
        for ep_rank, own in enumerate(slots):
            for slot, expert in enumerate(own):
                copies[expert].append(ep_rank * width + slot)
        most = max(map(len, copies))
        table = [[places[i % len(places)] for i in range(most)] for places in copies]
        return cls(
            slots=slots,
            width=width,
            places=torch.tensor(table, device=device),
            num_copies=torch.tensor([len(places) for places in copies], device=device),
        )

    def choose(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The places [T, k] that tokens at `positions` [T] go to for their experts `ids` [T, k].

        A token's copy depends on nothing but its position in its sequence: neighbours in the batch do not change it.
        """
        if self.places.shape[1] == 1:
            return self.places[ids, 0]
        return self.places[ids, positions.unsqueeze(1) % self.num_copies[ids]]

    def slots_on(self, ep_rank: int, places: torch.Tensor) -> torch.Tensor:
        """The slots of `places` as `ep_rank` numbers them, -1 for those on other ranks."""
        slots = places - ep_rank * self.width
        return torch.where((slots >= 0) & (slots < self.width), slots, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One expert on its way from an expert rank's slot to another's."""

    source: int
    source_slot: int
    target: int
    target_slot: int


def settle(now: Slots, wanted: Slots) -> Slots:
    """`wanted`, in an order that leaves every expert that stays on its rank in its slot."""
    settled: list[tuple[int, ...]] = []
    for own, new in zip(now, wanted, strict=True):
        assert len(own) == len(new), "every expert rank keeps its number of slots"
        newcomers = iter(sorted(set(new) - set(own)))
        settled.append(tuple(expert if expert in new else next(newcomers) for expert in own))
    return tuple(settled)


def transfers(now: Slots, wanted: Slots) -> list[Transfer]:
    """What brings `settle`d slots about. An expert comes from its holder that has given least so far."""
    given: Counter[int] = Counter()
    found: list[Transfer] = []
    for target, (own, new) in enumerate(zip(now, wanted, strict=True)):
        for slot, expert in enumerate(new):
            if expert != own[slot]:
                source = min((rank for rank in range(len(now)) if expert in now[rank]), key=lambda rank: given[rank])
                given[source] += 1
                found.append(
                    Transfer(source=source, source_slot=now[source].index(expert), target=target, target_slot=slot)
                )
    return found


def in_rounds(waiting: list[Transfer]) -> list[list[Transfer]]:
    """The same in rounds, in none of which a rank gives or takes more than one expert."""
    rounds: list[list[Transfer]] = []
    while waiting:
        now: list[Transfer] = []
        later: list[Transfer] = []
        for transfer in waiting:
            is_free = all(transfer.source != other.source and transfer.target != other.target for other in now)
            (now if is_free else later).append(transfer)
        rounds.append(now)
        waiting = later
    return rounds
