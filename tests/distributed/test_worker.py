"""Workers of several ranks go through the same steps together and answer as one rank does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from rank_processes import Ranks, free_address
from transformers import Qwen2Config, Qwen2ForCausalLM
from worker_life import Life, live

from qwen_ray.core.model_config import ModelConfig
from qwen_ray.core.plan import EngineConfig, ParallelPlan, ReplicaSpec
from qwen_ray.core.request import SamplingParams
from qwen_ray.core.step import Chunk, NewSequence, StepBatch, StepResult

CONFIG = Qwen2Config(
    vocab_size=131,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
ENGINE = EngineConfig(num_blocks=24, block_size=4, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32)
SAMPLED = SamplingParams(temperature=1.2, top_p=0.9, logprobs=2, prompt_logprobs=0, frequency_penalty=0.5)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(6)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ReplicaSpec:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint")
    Qwen2ForCausalLM(CONFIG).save_pretrained(path)
    config = ModelConfig.from_dict(CONFIG.to_dict())
    plan = ParallelPlan.of(config)
    return ReplicaSpec(name="tiny", path=str(path), config=config, plan=plan, engine=ENGINE, dtype="float32")


def new(sequence_id: int, prompt: range, sampling: SamplingParams) -> NewSequence:
    return NewSequence(
        sequence_id=sequence_id,
        token_ids=tuple(prompt),
        num_prompt_tokens=len(prompt),
        sampling=sampling,
        seed=4,
        stop_token_ids=(),
    )


# Two prompts, one of them in chunks; decodes; a third sequence takes the blocks of one that was dropped; a step that
# computes nothing. The decoded tokens are given: what is compared is what each step answers.
BATCHES = [
    StepBatch(
        step_id=0,
        new=(new(1, range(3, 20), SamplingParams(temperature=0.0)), new(2, range(40, 49), SAMPLED)),
        chunks=(
            Chunk(sequence_id=1, start=0, count=10, new_blocks=(7, 3, 11)),
            Chunk(sequence_id=2, start=0, count=9, new_blocks=(0, 23, 5)),
        ),
    ),
    StepBatch(
        step_id=1,
        chunks=(
            Chunk(sequence_id=2, start=9, count=1, new_tokens=(77,)),
            Chunk(sequence_id=1, start=10, count=7, new_blocks=(12, 13)),
        ),
    ),
    StepBatch(step_id=2, chunks=(), dropped=(2,)),
    StepBatch(
        step_id=3,
        new=(new(3, range(90, 95), SAMPLED),),
        chunks=(
            Chunk(sequence_id=3, start=0, count=5, new_blocks=(23, 0)),
            Chunk(sequence_id=1, start=17, count=1, new_tokens=(8,)),
        ),
    ),
]


@pytest.fixture(scope="module")
def alone(spec: ReplicaSpec) -> Life:
    return live(0, spec, "", BATCHES)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (3, 1), (1, 3), (3, 2)])
def test_ranks_answer_as_one_does(ranks: Ranks, spec: ReplicaSpec, alone: Life, tp: int, pp: int) -> None:
    spec = replace(spec, plan=ParallelPlan.of(spec.config, tp=tp, pp=pp))
    lives: list[Life] = ranks.run(tp * pp, live, spec, free_address(), BATCHES)
    samples = [shard.samples for shard in spec.plan.shards(spec.config)]
    for rank, life in enumerate(lives):
        if not samples[rank]:
            assert life.results == [None] * len(BATCHES)
    answers = lives[samples.index(True)].results
    assert [replace(r, seconds=0.0) for r in lives[samples.index(True)].again if r] == [
        replace(r, seconds=0.0) for r in answers if r
    ]
    for answer, expected in zip(answers, alone.results, strict=True):
        assert answer is not None
        assert expected is not None
        assert tokens(answer) == tokens(expected)
        assert logprobs(answer) == pytest.approx(logprobs(expected), abs=1e-4)


def tokens(result: StepResult) -> list[tuple[int, int, str | None]]:
    return [(sample.sequence_id, sample.token_id, sample.error) for sample in result.samples]


def logprobs(result: StepResult) -> list[float]:
    entries = [sample.logprobs for sample in result.samples if sample.logprobs is not None]
    entries += [entry for prompt in result.prompt_logprobs for entry in prompt.entries]
    return [value for entry in entries for value in (entry.logprob, *(p for _, p in entry.top))]


def test_one_rank_answers_every_step(alone: Life) -> None:
    assert [len(result.samples) for result in alone.results if result is not None] == [1, 2, 0, 2]
    assert [len(result.prompt_logprobs) for result in alone.results if result is not None] == [1, 0, 0, 1]


def test_every_rank_reads_its_shard_alone(ranks: Ranks, spec: ReplicaSpec) -> None:
    spec = replace(spec, plan=ParallelPlan.of(spec.config, tp=2, pp=2))
    lives: list[Life] = ranks.run(4, live, spec, free_address(), BATCHES)
    for rank, life in enumerate(lives):
        assert (life.stats.rank, life.stats.stage, life.stats.tp_rank) == (rank, rank // 2, rank % 2)
        assert life.progress == (life.stats.weights_bytes, life.stats.weights_bytes)
        # The checkpoint is float32, as is the rank: its bytes are the file's.
        assert life.stats.weights_bytes <= life.stats.bytes_read <= 1.05 * life.stats.weights_bytes
        assert life.stats.num_steps == len(BATCHES)
        assert life.stats.num_tokens == sum(batch.num_tokens for batch in BATCHES)
    # Layers 0 and 1 on the first stage, 2 on the second; one of two KV heads each.
    assert [life.stats.kv_bytes for life in lives] == [24 * 4 * 2 * 16 * 4 * n for n in (2, 2, 1, 1)]
