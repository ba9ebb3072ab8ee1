"""Steps without tokens, and counts of experts, over a model that computes nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.step import StepBatch, StepResult
from qwen_ray.kernels import reference
from qwen_ray.layers.batch import ForwardBatch
from qwen_ray.models.stage import Stage
from qwen_ray.worker.runner import Runner
from qwen_ray.worker.worker import first_step

CPU = torch.device("cpu")
EMPTY = StepBatch(step_id=5, chunks=(), dropped=(1,))


class Model:
    """A stage with one dense and one sparse layer. Each token goes to expert 1."""

    def __init__(self, *, dp_size: int, samples: bool) -> None:
        self.shard = SimpleNamespace(dp_size=dp_size, samples=samples)
        self.batches: list[ForwardBatch] = []
        self.num_tokens = 0

    def hidden(self, batch: ForwardBatch) -> torch.Tensor:
        self.batches.append(batch)
        self.num_tokens += batch.num_tokens
        return torch.zeros(len(batch.logit_rows), 2)

    greatest = staticmethod(reference.greatest)

    def logits(self, x: torch.Tensor) -> torch.Tensor | None:
        return torch.zeros(len(x), 3) if self.shard.samples else None

    def expert_tokens(self) -> tuple[tuple[int, ...], ...]:
        return ((), (0, self.num_tokens))


def runner(model: Model) -> Runner:
    return Runner(cast(Stage, model), block_size=4, device=CPU)


@pytest.mark.parametrize("samples", [False, True])
def test_a_step_without_tokens_is_computed_where_others_wait_for_it(samples: bool) -> None:
    model = Model(dp_size=2, samples=samples)
    answer = StepResult(step_id=5) if samples else None
    assert runner(model).run(EMPTY) == answer
    (batch,) = model.batches
    assert (batch.num_tokens, batch.num_sequences) == (0, 0)
    assert {len(t) for t in (batch.token_ids, batch.positions, batch.slots, batch.logit_rows)} == {0}
    assert batch.block_tables.shape[0] == 0
    assert all(t.dtype is torch.int64 for t in (batch.slots, batch.block_tables))


@pytest.mark.parametrize("samples", [False, True])
def test_nobody_waits_for_a_single_dp_rank(samples: bool) -> None:
    model = Model(dp_size=1, samples=samples)
    assert runner(model).run(EMPTY) == (StepResult(step_id=5) if samples else None)
    assert not model.batches


def test_tokens_of_the_first_step_are_nobody_s() -> None:
    model = Model(dp_size=1, samples=True)
    step = first_step(EngineConfig(num_blocks=4, block_size=4, max_num_seqs=2), 10)
    warm_up = runner(model)
    warm_up.run(step)
    assert warm_up.expert_tokens() == ((), (0, 10))
    serving = runner(model)
    assert serving.expert_tokens() == ((), (0, 0))
    serving.run(step)
    assert serving.expert_tokens() == ((), (0, 10))
