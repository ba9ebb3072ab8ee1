"""Steps of decodes over tensors that stay where they are, as CUDA graphs want them; the kernels are interpreted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import PROMPTS, QWEN2, QWEN3_MOE, generate, replica_spec

from qwen_ray.core.model_config import ModelConfig
from qwen_ray.core.request import SamplingParams
from qwen_ray.kernels.registry import Kernels
from qwen_ray.models.stage import Stage
from qwen_ray.worker import cuda_graph
from qwen_ray.worker.cuda_graph import DecodeGraphs, Run
from qwen_ray.worker.local import LocalExecutor
from qwen_ray.worker.worker import Worker

pytest.importorskip("triton")
import interpreted

interpreted.improve()
GREEDY = SamplingParams(temperature=0.0)


class Captures:
    """In place of CUDA's: a graph computes anew, over the same tensors. The kernels are those for CUDA."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> None:
        self.num_captured = self.num_replayed = 0
        self._fails = fails

        def graphs(worker: Worker, model: Stage) -> object:
            return DecodeGraphs(model, worker._spec.engine, worker._device, self.capture).hidden

        monkeypatch.setattr(Worker, "_graphs", graphs)
        monkeypatch.setattr(Kernels, "of", lambda _, dtype, deterministic: Kernels.on_cuda(dtype))

    def capture(self, run: Run) -> Run:
        if self._fails:
            raise torch.AcceleratorError("operation not permitted when stream is capturing")
        self.num_captured += 1

        def replay() -> torch.Tensor:
            self.num_replayed += 1
            return run()

        return replay


async def tokens_of(config: ModelConfig) -> tuple[list[list[int]], tuple[tuple[int, ...], ...]]:
    """And how many of them each expert has computed."""
    executor = LocalExecutor(replica_spec(config, Path("/nowhere"), load_format="dummy"))
    try:
        outputs, _ = await generate(executor, PROMPTS, GREEDY)
        return outputs, executor.stats().expert_tokens
    finally:
        executor.close()


@pytest.mark.parametrize("config", [QWEN2, QWEN3_MOE], ids=["dense", "sparse"])
async def test_tokens_are_those_of_steps_without_graphs(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences go as four, and nobody's row goes to no expert. Longer contexts take another graph."""
    expected = await tokens_of(config)
    monkeypatch.setattr(cuda_graph, "SHORT_CONTEXT", 2)
    captures = Captures(monkeypatch)
    assert await tokens_of(config) == expected
    assert captures.num_captured == 2  # of 11 to 16 tokens, and more
    assert captures.num_replayed == 8 - 2


async def test_without_graphs_if_none_can_be_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = await tokens_of(QWEN2)
    Captures(monkeypatch, fails=True)
    assert await tokens_of(QWEN2) == expected
    assert [record.message for record in caplog.records] == [
        "steps are launched kernel by kernel from now on: no CUDA graph could be made: "
        "operation not permitted when stream is capturing"
    ]


def test_every_size_has_a_graph() -> None:
    assert cuda_graph.SIZES[-1] == cuda_graph.MOST_GRAPH_ROWS
    assert list(cuda_graph.SIZES) == sorted(set(cuda_graph.SIZES))
