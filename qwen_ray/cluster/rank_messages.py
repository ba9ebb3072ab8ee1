"""What travels between a replica and its ranks, beside the steps themselves."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_ray.cluster.wire import Codec
from qwen_ray.core.step import MoveExperts, StepBatch, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A rank's first message: whose channel this is."""

    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Bytes of this rank's shard, read and in all."""

    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A step raised. The rank takes no further step, but lives on and answers `stats`."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """To a rank: let go of the group and of all memory. The end of the channel means the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """A rank's answer to Stop: it holds nothing any more and may be killed."""


RankMessage = StepBatch | MoveExperts | StepResult | Hello | Progress | Failed | Stop | Released

RANK_CODEC: Codec[RankMessage] = Codec(StepBatch, MoveExperts, StepResult, Hello, Progress, Failed, Stop, Released)
