"""What travels between a replica and its ranks, beside the steps themselves."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_ray.cluster.wire import Codec
from qwen_ray.core.step import MoveExperts, StepBatch, StepResult

ExpertSlots = dict[int, tuple[tuple[int, ...], ...]]  # by layer, as `ExpertPlacement.slots`


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A rank's first message: whose channel this is. `life` tells it from a process that was this rank before."""

    rank: int
    life: int
    pid: int
    node_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """Every second, from a thread of its own, as long as the process runs."""

    num_steps: int
    step_seconds: float = 0.0  # that the step under way has taken so far; 0 between two steps
    is_waiting: bool = False  # in that step, for or with other ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Bytes of this rank's shard, read and in all."""

    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A step, or a meeting, raised. The rank takes no step until it has met the others again.

    `is_lost`: its weights are gone; the process is good for nothing but questions.
    """

    reason: str
    is_lost: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """To a rank: take no step any more. It answers when it is out of the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused:
    """`experts`: where those of its layers lie now."""

    experts: ExpertSlots


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """To a rank that is paused: meet the others, forget all sequences, take steps. Rank 0 serves `address`."""

    address: str
    name: str
    warm_up: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A rank's answer to Join: what the warm-up computed, and how long it took."""

    num_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """To a rank: let go of the group and of all memory. The end of the channel means the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """A rank's answer to Stop: it holds nothing any more and may be killed."""


RankMessage = (
    StepBatch
    | MoveExperts
    | StepResult
    | Hello
    | Beat
    | Progress
    | Failed
    | Pause
    | Paused
    | Join
    | Joined
    | Stop
    | Released
)

RANK_CODEC: Codec[RankMessage] = Codec(
    StepBatch,
    MoveExperts,
    StepResult,
    Hello,
    Beat,
    Progress,
    Failed,
    Pause,
    Paused,
    Join,
    Joined,
    Stop,
    Released,
)
