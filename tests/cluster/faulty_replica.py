"""A replica whose ranks can be told to fail, or die of a prompt. Not a test."""

from __future__ import annotations

from typing import Any

import faulty_worker

from qwen_ray.cluster.group import RankGroup
from qwen_ray.serving.replica import Replica

start: Any = RankGroup.start
start.__func__.__kwdefaults__["worker"] = faulty_worker.NAME


class FaultyReplica(Replica):
    pass
