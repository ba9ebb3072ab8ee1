"""How loaded a replica must be by now: what it has said, and what it could not know of yet."""

from __future__ import annotations

from typing import Any, cast

from qwen_ray.core.stats import EngineStats
from qwen_ray.serving.link import Link
from qwen_ray.serving.messages import ReplicaStatus


def status(num_received: int) -> ReplicaStatus:
    return ReplicaStatus(
        replica="r",
        model="m",
        state="ready",
        tp=1,
        pp=1,
        node="n",
        pid=1,
        started=0.0,
        engine=EngineStats(),
        num_received=num_received,
    )


def test_what_a_status_has_crossed_still_counts() -> None:
    link = Link("r", cast(Any, None))
    for num_tokens in (5, 7, 11):
        link.submitted(num_tokens)
    assert link.load() == (23, 3)
    assert link.take(status(1))
    assert link.load() == (18, 2)
    link.submitted(2)
    link.take(status(1))
    assert link.load() == (20, 3)
    link.take(status(4))
    assert link.load() == (0, 0)
