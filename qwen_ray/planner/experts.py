"""Which expert rank holds which experts, given what the experts have had to do.

Knows tokens per expert, ranks and slots. Knows nothing of bytes, speeds, or how experts travel. The method is EPLB's
(DeepSeek-V3, arXiv 2412.19437, section 3.4): the hottest experts get the spare slots, copies are then packed onto
ranks so that the fullest rank has least. Where experts lie already, a few exchanges do nearly as well and move a tenth
of what packing anew would. Layers are independent of each other.

Also the one place that reads and writes an expert load file: what `qwen-ray plan --expert-load` is given.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from qwen_ray.core.errors import PlanRefused, SettingsError
from qwen_ray.core.model_config import ModelConfig
from qwen_ray.core.plan import ExpertPlacement, split_evenly

ExpertTokens = Sequence[Sequence[float]]  # by layer, () for a dense one, and expert
Slots = tuple[tuple[int, ...], ...]  # of one layer: experts by expert rank

# What is this part fuller than it need be counts as even: weights have to travel, and counts are partly chance.
TOLERANCE = 0.02


def balance(
    expert_tokens: ExpertTokens, *, ep: int, num_slots: Sequence[int], current: ExpertPlacement | None = None
) -> ExpertPlacement:
    """The placement under which the fullest of `ep` expert ranks has few tokens, in every layer.

    `num_slots` of each expert rank may differ by one. Slots beyond one for each expert are for copies of the hottest.
    Beside `current`, which must have these slots, experts stay where they are unless moving them evens out more than
    TOLERANCE; a few that change places are preferred to many. Raises PlanRefused where experts and slots do not match.
    """
    layers: list[Slots] = []
    totals = [0.0] * ep  # of the layers so far: what cannot be evened out in one layer falls on another rank each time
    for i, tokens in enumerate(expert_tokens):
        before = current.slots[i] if current and tokens else ()
        layers.append(_balance_layer(tokens, ep, num_slots, before, totals) if tokens else ())
        if tokens:
            totals = [a + b for a, b in zip(totals, rank_tokens(tokens, layers[-1]), strict=True)]
    return ExpertPlacement(slots=tuple(layers))


def even_slots(num_experts: int, ep: int, num_redundant: int = 0) -> tuple[int, ...]:
    """Slots of each expert rank for one copy of each expert and `num_redundant` more."""
    return tuple(map(len, split_evenly(num_experts + num_redundant, ep)))


def imbalance(expert_tokens: ExpertTokens, placement: ExpertPlacement) -> float:
    """Tokens of the fullest expert rank over those of the mean one; 1.0 where there are none.

    Layers are added up as they are waited for: of each, the fullest. As `core.stats.ExpertLoad.imbalance`.
    """
    layers = [rank_tokens(tokens, slots) for tokens, slots in zip(expert_tokens, placement.slots, strict=True) if slots]
    mean = sum(sum(ranks) / len(ranks) for ranks in layers)
    return sum(map(max, layers)) / mean if mean else 1.0


def layer_imbalances(expert_tokens: ExpertTokens, placement: ExpertPlacement) -> tuple[float, ...]:
    """The same of each layer; 1.0 for a dense one."""
    return tuple(
        imbalance([tokens], ExpertPlacement(slots=(slots,)))
        for tokens, slots in zip(expert_tokens, placement.slots, strict=True)
    )


def rank_tokens(tokens: Sequence[float], slots: Slots) -> list[float]:
    """Of one layer, by expert rank. Copies of an expert share its tokens evenly."""
    weight = _weight_of_copies(tokens, slots)
    return [sum(weight[expert] for expert in own) for own in slots]


def _weight_of_copies(tokens: Sequence[float], slots: Slots) -> list[float]:
    """Tokens of each copy, by expert."""
    num_copies = Counter(expert for own in slots for expert in own)
    return [load / num_copies[expert] for expert, load in enumerate(tokens)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoadFile:
    """Tokens that a model's experts have computed: by layer, () for a dense one, and expert."""

    model: str
    num_experts: int
    expert_tokens: tuple[tuple[float, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object, *, origin: str) -> ExpertLoadFile:
        """Raises SettingsError naming `origin` and the field."""
        if not isinstance(value, Mapping):
            raise SettingsError(f"{origin}: not a JSON object.", field="expert_load")
        fields = cast(Mapping[str, object], value)
        unknown = sorted(set(fields) - {"model", "num_experts", "expert_tokens"})
        if unknown:
            raise _wrong(origin, unknown[0], "unknown key")
        model, num_experts = fields.get("model", ""), fields.get("num_experts")
        if not isinstance(model, str):
            raise _wrong(origin, "model", "must be a name", model)
        if not isinstance(num_experts, int) or isinstance(num_experts, bool) or num_experts < 1:
            raise _wrong(origin, "num_experts", "must be a positive integer", num_experts)
        layers = fields.get("expert_tokens")
        if not isinstance(layers, Sequence) or isinstance(layers, str):
            raise _wrong(origin, "expert_tokens", "must be a list of lists", layers)
        rows = cast(Sequence[object], layers)
        read = tuple(_numbers(row, num_experts, f"expert_tokens[{i}]", origin) for i, row in enumerate(rows))
        return cls(model=model, num_experts=num_experts, expert_tokens=read)

    def check(self, config: ModelConfig, *, origin: str) -> None:
        """Raises SettingsError where this is not the load of such a model."""
        num_experts = config.moe.num_experts if config.moe else 0
        if self.num_experts != num_experts:
            raise _wrong(origin, "num_experts", f"the model has {num_experts} experts a layer", self.num_experts)
        num_layers = config.num_hidden_layers
        if len(self.expert_tokens) != num_layers:
            raise _wrong(origin, "expert_tokens", f"the model has {num_layers} layers", len(self.expert_tokens))
        for i, tokens in enumerate(self.expert_tokens):
            if bool(tokens) != config.is_sparse(i):
                what = "has experts" if config.is_sparse(i) else "is dense"
                raise _wrong(origin, f"expert_tokens[{i}]", f"layer {i} of the model {what}", list(tokens))


def _balance_layer(
    tokens: Sequence[float], ep: int, num_slots: Sequence[int], current: Slots, totals: Sequence[float]
) -> Slots:
    num_experts, total = len(tokens), sum(num_slots)
    if len(num_slots) != ep or max(num_slots) - min(num_slots) > 1:
        raise PlanRefused(f"{ep} expert ranks need as many numbers of slots, even ones, got {list(num_slots)}.")
    if not num_experts <= total <= num_experts * ep:
        raise PlanRefused(
            f"{total} slots on {ep} expert ranks cannot hold {num_experts} experts, each once a rank at most.",
            inequality=f"{num_experts} <= {total} slots <= {num_experts * ep}",
        )
    copies = _num_copies(tokens, total - num_experts, ep)
    packed = _swapped(tokens, tuple(map(tuple, _pack(tokens, copies, num_slots, totals))))
    if not current:
        return tuple(tuple(sorted(own)) for own in packed)
    choices = (current, _swapped(tokens, current), _relabelled(packed, current))  # few moves first
    fullest = [max(rank_tokens(tokens, slots)) for slots in choices]
    return next(slots for slots, load in zip(choices, fullest, strict=True) if load <= min(fullest) * (1 + TOLERANCE))


def _swapped(tokens: Sequence[float], current: Slots) -> Slots:
    """An expert of the fullest rank changes places with one of the emptiest, again and again, while that helps.

    The same copies as in `current`; each exchange brings both ranks nearer to the middle between them.
    """
    weight = _weight_of_copies(tokens, current)
    ranks = [list(own) for own in current]
    loads = [sum(weight[expert] for expert in own) for own in ranks]
    while True:
        full, empty = loads.index(max(loads)), loads.index(min(loads))
        if loads[full] <= sum(loads) / len(loads) * (1 + TOLERANCE):
            break
        half = (loads[full] - loads[empty]) / 2
        both = set(ranks[full]).intersection(ranks[empty])
        given = [(weight[a] - half, i) for i, a in enumerate(ranks[full]) if a not in both]
        taken = [(weight[b], j) for j, b in enumerate(ranks[empty]) if b not in both]
        missed, i, j = min(((abs(x - y), i, j) for x, i in given for y, j in taken), default=(half, 0, 0))
        if missed >= half * (1 - TOLERANCE):
            break
        a, b = ranks[full][i], ranks[empty][j]
        ranks[full][i], ranks[empty][j] = b, a
        loads[full] -= weight[a] - weight[b]
        loads[empty] += weight[a] - weight[b]
    return tuple(map(tuple, ranks))


def _num_copies(tokens: Sequence[float], num_redundant: int, ep: int) -> list[int]:
    """Each further copy to the expert whose copies have most to do, among those that are not on every rank yet."""
    copies = [1] * len(tokens)
    queue = [(-load, expert) for expert, load in enumerate(tokens)] if ep > 1 else []
    heapq.heapify(queue)
    for _ in range(num_redundant):
        _, expert = heapq.heappop(queue)
        copies[expert] += 1
        if copies[expert] < ep:
            heapq.heappush(queue, (-tokens[expert] / copies[expert], expert))
    return copies


def _pack(
    tokens: Sequence[float], copies: Sequence[int], num_slots: Sequence[int], totals: Sequence[float]
) -> list[set[int]]:
    """Heaviest copy first, each to the rank with least to do that has a free slot and not this expert."""
    ranks: list[set[int]] = [set() for _ in num_slots]
    loads = [0.0] * len(ranks)
    weight = [load / count for load, count in zip(tokens, copies, strict=True)]
    for expert in sorted(range(len(tokens)), key=lambda e: (-weight[e], e)):
        for _ in range(copies[expert]):
            free = [r for r, own in enumerate(ranks) if len(own) < num_slots[r]]
            to = min((r for r in free if expert not in ranks[r]), key=lambda r: (loads[r], totals[r]), default=None)
            if to is None:  # only ranks that have it are free: another expert gives way
                room = free[0]
                to, other = _make_room(ranks, loads, weight, expert, room)
                ranks[to].remove(other)
                ranks[room].add(other)
                loads[to] -= weight[other]
                loads[room] += weight[other]
            ranks[to].add(expert)
            loads[to] += weight[expert]
    return ranks


def _make_room(
    ranks: Sequence[set[int]], loads: Sequence[float], weight: Sequence[float], expert: int, room: int
) -> tuple[int, int]:
    """The rank that takes `expert`, and which of its experts moves to `room`. There is one, as slots are even."""
    choices = [
        (max(loads[room] + weight[other], loads[rank] - weight[other] + weight[expert]), rank, other)
        for rank, own in enumerate(ranks)
        if expert not in own
        for other in own - ranks[room]
    ]
    _, rank, other = min(choices)
    return rank, other


def _relabelled(packed: Slots, current: Slots) -> Slots:
    """The same sets, given to the ranks that have most of them already; experts that stay keep their slot."""
    pairs = [
        (len(set(own).intersection(held)), new, rank)
        for new, own in enumerate(packed)
        for rank, held in enumerate(current)
        if len(own) == len(held)
    ]
    given: dict[int, set[int]] = {}
    taken: set[int] = set()
    for _, new, rank in sorted(pairs, key=lambda pair: (-pair[0], pair[1:])):
        if new not in taken and rank not in given:
            given[rank] = set(packed[new])
            taken.add(new)
    slots: list[tuple[int, ...]] = []
    for rank, held in enumerate(current):
        arrivals = iter(sorted(given[rank].difference(held)))
        slots.append(tuple(expert if expert in given[rank] else next(arrivals) for expert in held))
    return tuple(slots)


def _numbers(row: object, num_experts: int, field: str, origin: str) -> tuple[float, ...]:
    if not isinstance(row, Sequence) or isinstance(row, str):
        raise _wrong(origin, field, "must be a list of numbers", row)
    numbers: list[float] = []
    for value in cast(Sequence[object], row):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise _wrong(origin, field, "must hold numbers of tokens", value)
        numbers.append(value)
    if len(numbers) not in (0, num_experts):
        raise _wrong(origin, field, f"must have {num_experts} numbers, or none for a dense layer", len(numbers))
    return tuple(numbers)


def _wrong(origin: str, field: str, message: str, *got: object) -> SettingsError:
    shown = f" (got {got[0]!r})" if got else ""
    return SettingsError(f"{origin}: {field}: {message}{shown}.", field=field)
