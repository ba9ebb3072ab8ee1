"""What an ingress and a replica (or another ingress) say to each other over the channel between them.

One `Deltas` message a step carries all that the step gave to the sequences of one ingress. A replica pushes its
`ReplicaStatus` at every change of state and a few times a second; `Ask` gets what is too dear to push.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from qwen_ray.cluster.wire import Codec
from qwen_ray.core.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    NotReady,
    Overloaded,
    RequestError,
    RequestFailed,
)
from qwen_ray.core.request import GenerateRequest, TokenDelta
from qwen_ray.core.stats import EngineStats, RankStats

# repairing: some ranks are being replaced, the others keep their weights, and all sequences stay in the queue.
# draining: it is about to be removed and goes on only with what nobody else can take over.
ReplicaState = Literal["loading", "ready", "repairing", "draining", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """One replica, as it sees itself."""

    replica: str
    model: str
    state: ReplicaState
    tp: int
    pp: int
    node: str
    pid: int
    started: float  # seconds since the epoch
    load_seconds: float = 0.0
    num_restarts: int = 0  # of all ranks
    num_repairs: int = 0  # of some, while the others stayed
    error: str | None = None
    engine: EngineStats | None = None
    stalled_seconds: float = 0.0  # with work and no step for longer than it is patient; 0 when all is well
    stage: str = ""  # starting, reading weights, warming up, ready, repairing
    bytes_done: int = 0  # of all ranks' weights
    bytes_total: int = 0  # 0 while unknown
    dp_attention: int = 1
    ep: int = 1
    expert_imbalance: float | None = None  # tokens of the fullest expert rank over the mean, lately; None: no experts
    num_rebalances: int = 0
    fingerprint: str = ""  # of what decides tokens: replicas with the same one carry on each other's requests
    num_received: int = 0  # requests that have come over the channel that this goes by; `sessions.py` counts them

    @property
    def trouble(self) -> str | None:
        """Why it cannot take requests; None if it can. Alive means making progress. What comes during a repair waits
        in its queue for some seconds; only a long one is trouble."""
        if self.state not in ("ready", "repairing"):
            return self.error or self.state
        if self.stalled_seconds:
            return f"without progress for {self.stalled_seconds:.0f} s"
        return None

    @property
    def is_on_its_way(self) -> bool:
        """It cannot take requests, but will: there is something to wait for."""
        return self.trouble is not None and self.state not in ("draining", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    requests: tuple[GenerateRequest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """`status`: the replica with its ranks, which costs them a call; `metrics`: its text exposition."""

    ask_id: int
    what: Literal["status", "metrics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deltas:
    deltas: tuple[TokenDelta, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The engine did not take a request: a RequestError on its way to the client."""

    request_id: str
    kind: str
    message: str
    param: str | None = None
    retry_after: float = 0.0

    @classmethod
    def of(cls, request_id: str, error: RequestError) -> Refusal:
        retry_after = error.retry_after if isinstance(error, Overloaded) else 0.0
        kind = type(error).__name__
        return cls(request_id=request_id, kind=kind, message=error.message, param=error.param, retry_after=retry_after)

    def to_error(self) -> RequestError:
        if self.kind == "Overloaded":
            return Overloaded(self.message, retry_after=self.retry_after)
        if self.kind == "ContextLengthExceeded":
            return ContextLengthExceeded(self.message, param=self.param or "messages")
        if self.kind == "DeadlineExceeded":
            return DeadlineExceeded(self.message)
        known: dict[str, type[RequestError]] = {"InvalidRequest": InvalidRequest, "NotReady": NotReady}
        return known.get(self.kind, RequestFailed)(self.message, param=self.param)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    ask_id: int
    status: ReplicaStatus | None = None
    ranks: tuple[RankStats, ...] = ()
    metrics: str = ""


CODEC: Codec[Any] = Codec(Submit, Abort, Ask, Deltas, Refusal, Answer, ReplicaStatus)
