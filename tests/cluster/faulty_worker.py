"""A rank that can be told to fail, by files beside the checkpoint, or by a prompt. Not a test."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from qwen_ray.core.plan import ReplicaSpec
from qwen_ray.core.step import StepBatch, StepResult
from qwen_ray.worker.worker import Worker

NAME = f"{__name__}:FaultyWorker"
POISON = (7, 7, 7, 3, 7)  # the tokens of a prompt that kills the rank that sees it


class FaultyWorker(Worker):
    """Does once what the file `RANK.FAULT` says, when its next step comes."""

    def __init__(self, spec: ReplicaSpec, rank: int) -> None:
        super().__init__(spec, rank)
        self._faults = {fault: Path(spec.path) / f"{rank}.{fault}" for fault in ("hang", "lose", "raise")}

    def execute(self, batch: StepBatch) -> StepResult | None:
        for fault, file in self._faults.items():
            if file.exists():
                file.unlink()
                self._commit(fault)
        if any(new.token_ids[: len(POISON)] == POISON for new in batch.new):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(batch)

    def _commit(self, fault: str) -> None:
        if fault == "hang":
            time.sleep(3600)
        raise RuntimeError("CUDA error: unspecified launch failure" if fault == "lose" else "something else")
