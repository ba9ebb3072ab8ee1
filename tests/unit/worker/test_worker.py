"""A whole rank in one process: against transformers, and what it says about itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_models import (
    LLAMA,
    NUM_NEW,
    PROMPTS,
    QWEN2,
    QWEN3_MOE,
    generate,
    new,
    random_tensors,
    replica_spec,
    write_gguf,
    write_safetensors,
)
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen_ray.core.errors import CheckpointError, PlanRefused, RankFailed
from qwen_ray.core.plan import EngineConfig, ParallelPlan
from qwen_ray.core.request import SamplingParams
from qwen_ray.core.step import Chunk, Sample, StepBatch
from qwen_ray.kernels.cpu import library
from qwen_ray.worker.local import LocalExecutor
from qwen_ray.worker.worker import first_step


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_safetensors(tmp_path_factory.mktemp("worker"), random_tensors(QWEN2), 2)


@pytest.fixture(scope="module")
def reference() -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=QWEN2.vocab_size,
        hidden_size=QWEN2.hidden_size,
        intermediate_size=QWEN2.intermediate_size,
        num_hidden_layers=QWEN2.num_hidden_layers,
        num_attention_heads=QWEN2.num_attention_heads,
        num_key_value_heads=QWEN2.num_key_value_heads,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).eval()
    model.load_state_dict(random_tensors(QWEN2))
    return model


@pytest.fixture
def executor(checkpoint: Path) -> Iterator[LocalExecutor]:
    executor = LocalExecutor(replica_spec(QWEN2, checkpoint))
    yield executor
    executor.close()


async def test_greedy_tokens_are_those_of_transformers(executor: LocalExecutor, reference: Qwen2ForCausalLM) -> None:
    outputs, _ = await generate(executor, PROMPTS, SamplingParams(temperature=0.0))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([prompt])
        expected = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=-1
        )
        assert output == expected[0, len(prompt) :].tolist()


async def test_sampled_tokens_do_not_depend_on_the_batch(executor: LocalExecutor) -> None:
    sampling = SamplingParams(temperature=1.3, top_p=0.95, repetition_penalty=1.1)
    together, _ = await generate(executor, PROMPTS, sampling)
    alone, _ = await generate(executor, PROMPTS[:1], sampling)
    assert alone[0] == together[0]


@pytest.mark.skipif(library.load() is None, reason="torch's products depend on how many rows they have")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_sequence_says_the_same_however_it_was_computed(checkpoint: Path, dtype: str) -> None:
    """To the last bit: so a request that somebody else takes over, from its tokens so far, goes on as it would have."""
    executor = LocalExecutor(replace(replica_spec(QWEN2, checkpoint), dtype=dtype))
    tokens = tuple((7 * i) % 90 for i in range(45))

    async def computed(*cuts: int) -> list[Sample]:
        """In chunks that end there; another sequence's tokens beside each."""
        sequences = (new(0, tokens, SamplingParams(logprobs=4)), new(1, tokens, SamplingParams()))
        result = None
        for start, end in pairwise((0, *cuts, len(tokens))):
            blocks = [tuple(range(first, first + 12)) if start == 0 else () for first in (0, 12)]
            chunks = [Chunk(sequence_id=i, start=start, count=end - start, new_blocks=blocks[i]) for i in range(2)]
            batch = StepBatch(step_id=end, new=sequences if start == 0 else (), chunks=tuple(chunks))
            result = await executor.submit(batch)
        await executor.submit(StepBatch(step_id=99, chunks=(), dropped=(0, 1)))
        assert result is not None
        return [sample for sample in result.samples if sample.sequence_id == 0]

    try:
        decoded = await computed(*range(20, 45))
        assert decoded[0].logprobs is not None
        assert await computed() == decoded
        assert await computed(1, 17, 18, 40) == decoded
    finally:
        executor.close()


async def test_logprobs_are_the_model_s_own(executor: LocalExecutor, reference: Qwen2ForCausalLM) -> None:
    sampling = SamplingParams(temperature=0.5, logprobs=2, prompt_logprobs=1, logit_bias={3: 50.0})
    _, result = await generate(executor, PROMPTS[:1], sampling)
    with torch.no_grad():
        raw = reference(torch.tensor([PROMPTS[0]])).logits[0].log_softmax(-1)
    (chosen,), (described,) = result.samples, result.prompt_logprobs
    assert chosen.token_id == 3
    assert chosen.logprobs is not None
    assert chosen.logprobs.logprob == pytest.approx(raw[-1, 3].item(), abs=1e-4)
    assert described.start == 1
    entries = [(entry.token_id, entry.logprob) for entry in described.entries]
    expected = [(t, pytest.approx(raw[t - 1, t].item(), abs=1e-4)) for t in PROMPTS[0][1:]]
    assert entries == expected


async def test_gguf_and_safetensors_give_the_same_tokens(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    outputs = []
    for path in (write_safetensors(tmp_path / "st", tensors), write_gguf(tmp_path / "m.gguf", LLAMA, tensors)):
        executor = LocalExecutor(replica_spec(LLAMA, path))
        outputs.append((await generate(executor, PROMPTS, SamplingParams(temperature=0.0)))[0])
        executor.close()
    assert outputs[0] == outputs[1]


async def test_stats_count_what_was_held_and_done(executor: LocalExecutor) -> None:
    stats = executor.stats()
    assert stats.weights_bytes == QWEN2.num_parameters * 4 == stats.bytes_read
    assert stats.kv_bytes == 64 * 4 * 2 * QWEN2.num_hidden_layers * QWEN2.kv_size * 4
    assert stats.memory_bytes > stats.weights_bytes + stats.kv_bytes
    assert (stats.num_loads, stats.num_steps, stats.num_tokens) == (1, 0, 0)
    await generate(executor, PROMPTS, SamplingParams(temperature=0.0))
    after = executor.stats()
    assert after.num_steps == 1 + NUM_NEW + 1
    assert after.num_tokens == sum(map(len, PROMPTS)) + NUM_NEW * len(PROMPTS)
    assert after.step_seconds > 0


async def test_tokens_of_experts_are_counted_from_the_first_request_on() -> None:
    executor = LocalExecutor(replica_spec(QWEN3_MOE, Path("/nowhere"), load_format="dummy"))
    assert executor.stats().expert_tokens == ((0,) * 5, (), (0,) * 5)
    await generate(executor, PROMPTS, SamplingParams(temperature=0.0))
    stats = executor.stats()
    executor.close()
    num_last = (NUM_NEW + 1) * len(PROMPTS)  # of a prompt the last layer computes one token
    assert [sum(layer) for layer in stats.expert_tokens] == [2 * stats.num_tokens, 0, 2 * num_last]
    assert executor.stats().expert_tokens == ()  # the model is gone


async def test_progress_goes_up_to_the_whole(checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    LocalExecutor(replica_spec(QWEN2, checkpoint), lambda done, total: seen.append((done, total))).close()
    assert seen == sorted(seen)
    assert seen[-1] == (QWEN2.num_parameters * 4,) * 2


async def test_steps_run_one_after_the_other_in_a_thread_of_their_own(
    executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr("qwen_ray.worker.runner.prepare", lambda *a, **k: threads.append(threading.get_ident()))
    first = StepBatch(
        step_id=0,
        new=(new(0, (1, 2), SamplingParams()),),
        chunks=(Chunk(sequence_id=0, start=0, count=2, new_blocks=(0,)),),
    )
    later = [StepBatch(step_id=i, chunks=()) for i in (1, 2, 3)]
    steps = [asyncio.ensure_future(executor.submit(batch)) for batch in (first, *later)]
    with pytest.raises(RankFailed, match="rank 0 failed: AttributeError"):
        await steps[0]
    assert [(await step).step_id for step in steps[1:]] == [1, 2, 3]
    assert threads != [threading.get_ident()]


async def test_computing_uses_the_threads_of_the_spec(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        "qwen_ray.worker.runner.describe_prompts", lambda *_: seen.append(torch.get_num_threads()) or []
    )
    LocalExecutor(replace(replica_spec(QWEN2, checkpoint), num_threads=3)).close()
    assert seen == [3]


async def test_several_ranks_are_refused(checkpoint: Path) -> None:
    with pytest.raises(PlanRefused) as error:
        LocalExecutor(replica_spec(QWEN2, checkpoint, ParallelPlan.of(QWEN2, tp=2)))
    assert error.value.inequality == "tp (2) × pp (1) = 2 ranks > 1 rank in one process"
    with pytest.raises(PlanRefused) as error:
        LocalExecutor(replica_spec(QWEN3_MOE, checkpoint, ParallelPlan.of(QWEN3_MOE, ep=2)))
    assert error.value.inequality == "tp (1) × pp (1) × dp_attention (2) = 2 ranks > 1 rank in one process"


async def test_a_bad_checkpoint_is_told_and_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        LocalExecutor(replica_spec(QWEN2, tmp_path))
    assert threading.active_count() == before


async def test_dummy_weights_need_no_file() -> None:
    executor = LocalExecutor(replica_spec(QWEN2, Path("/nowhere"), load_format="dummy"))
    outputs, _ = await generate(executor, PROMPTS, SamplingParams(temperature=0.0))
    executor.close()
    executor.close()
    assert all(0 <= token < QWEN2.vocab_size for output in outputs for token in output)


@pytest.mark.parametrize(("num_seqs", "num_tokens", "max_len"), [(4, 32, 64), (64, 10, 64), (3, 100, 20), (1, 7, 7)])
@pytest.mark.parametrize("most", [5, 1000])
def test_the_first_step_stays_within_the_limits(num_seqs: int, num_tokens: int, max_len: int, most: int) -> None:
    engine = EngineConfig(
        num_blocks=3, block_size=4, max_model_len=max_len, max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens
    )
    batch = first_step(engine, most)
    num_tokens = min(num_tokens, most)
    assert batch.num_tokens == min(num_tokens, num_seqs * max_len)
    assert len(batch.chunks) == min(num_seqs, num_tokens)
    for chunk in batch.chunks:
        assert 1 <= chunk.count <= max_len
        assert len(chunk.new_blocks) * 4 >= chunk.count
        assert set(chunk.new_blocks) <= set(range(3))
