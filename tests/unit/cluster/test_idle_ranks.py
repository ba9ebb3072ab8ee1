"""When a group's ranks are idle: what is done beside them would slow a step down."""

from __future__ import annotations

import time

import pytest

from qwen_ray.cluster.group import idle_seconds
from qwen_ray.cluster.rank_messages import Beat

IN_STEP, BETWEEN = Beat(num_steps=3, step_seconds=4.0), Beat(num_steps=3)


@pytest.mark.parametrize(
    ("beats", "seconds"),
    [([], 5.0), ([None, BETWEEN], 5.0), ([BETWEEN, IN_STEP], 0.0)],
    ids=["no beat yet", "between two steps", "one in a long step"],
)
def test_ranks_are_idle_since_their_last_step_unless_one_is_in_it(beats: list[Beat | None], seconds: float) -> None:
    assert idle_seconds(beats, time.monotonic() - 5.0) == pytest.approx(seconds, abs=1.0)
