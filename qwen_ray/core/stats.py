"""What the processes say about themselves: plain numbers, made into metrics and tables elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStats:
    """One rank, as it sees itself. Sizes in bytes, times in seconds."""

    rank: int
    stage: int
    tp_rank: int
    pid: int
    node: str
    device: str
    weights_bytes: int = 0
    kv_bytes: int = 0
    memory_bytes: int = 0  # all that the process holds: RSS on CPU, allocated device memory on CUDA
    bytes_read: int = 0  # from the checkpoint
    load_seconds: float = 0.0
    num_loads: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    step_seconds: float = 0.0  # in total
    dp_rank: int = 0
    ep_rank: int = 0
    expert_tp_rank: int = 0
    first_layer: int = 0
    # Tokens that this rank's copies of each expert have computed: by layer, from `first_layer` on, and expert; () where
    # the layer is dense. A token counts once for each expert that it was sent to.
    expert_tokens: tuple[tuple[int, ...], ...] = ()
    num_moved_experts: int = 0  # received from other ranks while serving


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One engine step, for histograms."""

    num_sequences: int
    num_tokens: int
    num_output_tokens: int
    schedule_seconds: float
    step_seconds: float  # submit to result, as the engine sees it
    rank_seconds: float  # of that, inside the sampling rank


@dataclass(frozen=True, slots=True, kw_only=True)
class StartTimes:
    """Seconds of each phase of a start of all ranks, one after the other."""

    placed: float = 0.0  # a place was found, and processes with libraries run there
    read: float = 0.0  # weights
    warmed_up: float = 0.0  # the ranks have met, and run steps


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairTimes:
    """Seconds of each phase of a repair, one after the other; 0 for one that was not needed."""

    noticed: float = 0.0  # since the last step before it
    killed: float = 0.0  # what was left of the broken ranks
    started: float = 0.0  # new processes, with libraries
    loaded: float = 0.0  # their weights
    joined: float = 0.0  # all ranks
    first_step: float = 0.0  # after it

    def __str__(self) -> str:
        phases = ", ".join(f"{name.replace('_', ' ')} {seconds:.2f} s" for name, seconds in asdict(self).items())
        return f"{sum(asdict(self).values()):.2f} s: {phases}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimes:
    """When a finished request was where, seconds since the epoch, for histograms."""

    arrival: float
    first_scheduled: float
    first_token: float
    finished: float
    num_prompt_tokens: int
    num_output_tokens: int
    finish_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """An engine at one moment; `*_total` only grow."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0  # prompt tokens of waiting sequences still to be computed
    num_set_aside: int = 0  # sequences that ranks have died under, and that run alone therefore
    num_blocks: int = 0
    num_used_blocks: int = 0  # held by a sequence; cached blocks that could be evicted are not counted
    num_cached_blocks: int = 0  # evictable blocks whose content could still be hit
    block_size: int = 0
    steps_total: int = 0
    prompt_tokens_total: int = 0  # computed, prefix hits not counted
    output_tokens_total: int = 0
    prefix_queries_total: int = 0  # in tokens, as in vLLM
    prefix_hits_total: int = 0
    preemptions_total: int = 0
    refused_total: int = 0  # requests for which the queue was full
    overdue_total: int = 0  # requests that their deadline ended
    poisonous_total: int = 0  # requests that were ended because ranks died under them alone

    @property
    def kv_usage(self) -> float:
        return self.num_used_blocks / self.num_blocks if self.num_blocks else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingStats:
    """What autoscaling has last decided, and how often so far; counts of replicas."""

    target: int
    asked: int  # by the policy, before delays and bounds
    min: int
    max: int
    reason: str = ""  # for what is asked: backlog, kv_cache, idle; empty where it is the target
    # By (direction, reason): settings where the target changed though the policy did not ask for it.
    # What can happen is there from the start: a counter that begins at 1 hides its first event.
    decisions: dict[tuple[str, str], int] = field(
        default_factory=lambda: dict.fromkeys((("up", "backlog"), ("up", "kv_cache"), ("down", "idle")), 0)
    )

    def then(self, target: int, asked: int, reason: str, bounds: tuple[int, int]) -> ScalingStats:
        """What is so a moment later; a new target is a decision, for the reason that was there before it."""
        decisions = dict(self.decisions)
        if target != self.target:
            is_up = target > self.target
            was_asked = (self.asked > self.target) if is_up else (self.asked < self.target)
            why = ("up" if is_up else "down", self.reason if was_asked else "settings")
            decisions[why] = decisions.get(why, 0) + 1
        return replace(
            self, target=target, asked=asked, reason=reason, min=bounds[0], max=bounds[1], decisions=decisions
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """What the experts of one replica have computed, in tokens; () for a dense layer.

    `by_expert[layer][expert]`, and of the ranks that computed it `by_rank[layer][ep_rank]`.
    """

    by_expert: tuple[tuple[int, ...], ...] = ()
    by_rank: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, ranks: Sequence[RankStats]) -> ExpertLoad:
        """Since the ranks started; in order of layers, of those that are there.

        Of an expert that is cut over several ranks, the first one counts for all.
        """
        own = sorted((r for r in ranks if r.expert_tp_rank == 0), key=lambda r: (r.first_layer, r.ep_rank))
        layers: dict[int, list[tuple[int, ...]]] = {}
        for rank in own:
            for i, tokens in enumerate(rank.expert_tokens, start=rank.first_layer):
                layers.setdefault(i, []).append(tokens)
        in_order = [layers[i] for i in sorted(layers)]
        return cls(
            by_expert=tuple(tuple(map(sum, zip(*parts, strict=True))) for parts in in_order),
            by_rank=tuple(tuple(map(sum, parts)) if parts[0] else () for parts in in_order),
        )

    def since(self, earlier: ExpertLoad) -> ExpertLoad:
        """What came after `earlier`; everything, where the ranks have started anew in between."""
        by_expert, by_rank = _minus(self.by_expert, earlier.by_expert), _minus(self.by_rank, earlier.by_rank)
        if by_expert is None or by_rank is None:
            return self
        return ExpertLoad(by_expert=by_expert, by_rank=by_rank)

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.by_rank))

    @property
    def imbalance(self) -> float:
        """Tokens of the fullest expert rank over those of the mean one; 1 is even.

        Layers are added up as they are waited for: of each, the fullest.
        """
        layers = [layer for layer in self.by_rank if layer]
        mean = sum(sum(layer) / len(layer) for layer in layers)
        return sum(map(max, layers)) / mean if mean else 1.0


Table = tuple[tuple[int, ...], ...]


def _minus(now: Table, then: Table) -> Table | None:
    """None where they do not fit together, or something has become less."""
    if [*map(len, now)] != [*map(len, then)]:
        return None
    gone = tuple(tuple(x - y for x, y in zip(a, b, strict=True)) for a, b in zip(now, then, strict=True))
    return None if any(count < 0 for row in gone for count in row) else gone
