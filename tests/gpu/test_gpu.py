"""A rank on an NVIDIA GPU answers as one on a CPU does. Only run where there is a GPU (see the Makefile)."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen_ray.core.model_config import ModelConfig, Quantization
from qwen_ray.core.plan import EngineConfig, ParallelPlan, ReplicaSpec
from qwen_ray.core.request import SamplingParams
from qwen_ray.core.step import Chunk, NewSequence, StepBatch, StepResult
from qwen_ray.worker import cuda_graph, worker
from qwen_ray.worker.cuda_graph import Run
from qwen_ray.worker.local import LocalExecutor
from qwen_ray.worker.noise import gumbel, stream_key
from qwen_ray.worker.sampler import sample
from qwen_ray.worker.sequences import SequenceState

pytestmark = pytest.mark.gpu

CONFIG = Qwen2Config(
    vocab_size=151,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
SAMPLINGS = [
    SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.2),
    SamplingParams(temperature=1.5, top_k=20, min_p=0.02, logit_bias={5: 2.0}, frequency_penalty=0.5),
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ReplicaSpec:
    torch.manual_seed(0)
    path: Path = tmp_path_factory.mktemp("checkpoint")
    Qwen2ForCausalLM(CONFIG).save_pretrained(path)
    config = ModelConfig.from_dict(CONFIG.to_dict())
    engine = EngineConfig(num_blocks=64, block_size=16, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=64)
    return ReplicaSpec(
        name="tiny", path=str(path), config=config, plan=ParallelPlan.of(config), engine=engine, dtype="float32"
    )


async def run(spec: ReplicaSpec, num_prompts: int = 4) -> list[StepResult]:
    """Some prompts and eight decode steps, each fed with a fixed token: every step is compared by itself."""
    lengths = [9, 1, 30, 17][:num_prompts]
    executor = LocalExecutor(spec)
    try:
        new = tuple(
            NewSequence(
                sequence_id=i,
                token_ids=tuple(range(i, i + length)),
                num_prompt_tokens=length,
                sampling=sampling,
                seed=i,
                stop_token_ids=(),
            )
            for i, (length, sampling) in enumerate(zip(lengths, SAMPLINGS, strict=False))
        )
        chunks = tuple(
            Chunk(sequence_id=i, start=0, count=length, new_blocks=tuple(range(4 * i, 4 * i + 4)))
            for i, length in enumerate(lengths)
        )
        results = [await executor.submit(StepBatch(step_id=0, new=new, chunks=chunks))]
        for step in range(8):
            chunks = tuple(
                Chunk(sequence_id=i, start=length + step, count=1, new_tokens=(7 * step + i,))
                for i, length in enumerate(lengths)
            )
            results.append(await executor.submit(StepBatch(step_id=step + 1, chunks=chunks)))
        stats = executor.stats()
        assert stats.memory_bytes >= stats.weights_bytes + stats.kv_bytes
        return results
    finally:
        executor.close()


async def test_every_step_gives_the_tokens_of_a_cpu(spec: ReplicaSpec) -> None:
    expected = await run(spec)
    found = await run(replace(spec, device="cuda"))
    tokens = [[sample.token_id for sample in result.samples] for result in found]
    assert tokens == [[sample.token_id for sample in result.samples] for result in expected]
    assert logprobs(found[0]) == pytest.approx(logprobs(expected[0]), abs=1e-3)


def logprobs(result: StepResult) -> list[float]:
    entries = [sample.logprobs for sample in result.samples if sample.logprobs is not None]
    entries += [entry for prompt in result.prompt_logprobs for entry in prompt.entries]
    return [value for entry in entries for value in (entry.logprob, *(p for _, p in entry.top))]


@pytest.mark.parametrize("num_prompts", [1, 3])  # the latter go with a row that is nobody's
async def test_graphs_change_no_token(spec: ReplicaSpec, num_prompts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own = replace(spec, device="cuda")
    captured: list[Run] = []
    capture = cuda_graph.capturer()

    def seen(run: Run) -> Run:
        captured.append(run)
        return capture(run)

    monkeypatch.setattr(worker, "capturer", lambda: seen)
    found = await run(own, num_prompts)
    assert len(captured) == 2 + (num_prompts > 1)  # two before the first request
    monkeypatch.setattr(worker.Worker, "_graphs", lambda *_: None)
    expected = await run(own, num_prompts)
    tokens = [[sample.token_id for sample in result.samples] for result in found]
    assert tokens == [[sample.token_id for sample in result.samples] for result in expected]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
async def test_a_deterministic_answer_has_the_same_bits_in_any_company(
    spec: ReplicaSpec, dtype: str, quantization: Quantization
) -> None:
    own = replace(spec, device="cuda", dtype=dtype, quantization=quantization, deterministic=True)
    alone, among_four = await run(own, 1), await run(own, 4)
    for one, four in zip(alone, among_four, strict=True):
        assert one.samples == tuple(sample for sample in four.samples if sample.sequence_id == 0)
        assert one.prompt_logprobs == tuple(prompt for prompt in four.prompt_logprobs if prompt.sequence_id == 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_dummy_weights_are_made_on_the_device(spec: ReplicaSpec, dtype: str) -> None:
    results = await run(replace(spec, device="cuda", dtype=dtype, load_format="dummy", path="/nowhere"))
    assert all(sample.error is None for result in results for sample in result.samples)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
async def test_weights_of_few_bits_are_rounded_on_the_device(
    spec: ReplicaSpec, dtype: str, quantization: Quantization
) -> None:
    for load_format in ("auto", "dummy"):
        own = replace(spec, device="cuda", dtype=dtype, quantization=quantization, load_format=load_format)
        results = await run(own)
        assert all(sample.error is None for result in results for sample in result.samples)


def test_noise_is_that_of_a_cpu() -> None:
    keys = torch.tensor([stream_key(seed, 3 * seed) for seed in range(9)], dtype=torch.int32)
    ids = torch.arange(151_936, dtype=torch.int32)
    torch.testing.assert_close(gumbel(keys.cuda(), ids.cuda()).cpu(), gumbel(keys, ids), rtol=1e-4, atol=1e-5)


def test_sampling_a_whole_vocabulary_gives_the_tokens_of_a_cpu() -> None:
    logits = torch.randn(32, 151_936, generator=torch.Generator().manual_seed(0)) * 2.5
    states = [
        SequenceState(
            sequence_id=i,
            token_ids=array("q", range(20)),
            num_prompt_tokens=10,
            sampling=replace(SAMPLINGS[i % 4], prompt_logprobs=None, logprobs=None),
            seed=i,
            stop_token_ids=(),
            blocks=array("q"),
        )
        for i in range(32)
    ]
    assert sample(logits.cuda(), states) == sample(logits, states)
