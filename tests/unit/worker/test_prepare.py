"""Step batches to forward batches, against a slow rank that works token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.core.request import SamplingParams
from qwen_ray.core.step import Chunk, NewSequence, StepBatch
from qwen_ray.worker.prepare import PreparedBatch, prepare, to_device
from qwen_ray.worker.sequences import SequenceTable

BLOCK_SIZE = 4
CPU = torch.device("cpu")


def new(sequence_id: int, token_ids: tuple[int, ...], *, num_prompt: int | None = None, **params: int) -> NewSequence:
    return NewSequence(
        sequence_id=sequence_id,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids) if num_prompt is None else num_prompt,
        sampling=SamplingParams(**params),
        seed=1,
        stop_token_ids=(),
    )


def run(table: SequenceTable, batch: StepBatch) -> PreparedBatch:
    return prepare(batch.chunks, table.apply(batch), block_size=BLOCK_SIZE, device=CPU)


def test_a_prefill_chunk_beside_a_decode() -> None:
    table = SequenceTable()
    prompt = tuple(range(100, 106))
    first = StepBatch(
        step_id=0, new=(new(7, prompt),), chunks=(Chunk(sequence_id=7, start=0, count=6, new_blocks=(5, 2)),)
    )
    prepared = run(table, first)
    assert prepared.sample_rows == (0,)
    assert prepared.forward.slots.tolist() == [20, 21, 22, 23, 8, 9]
    second = StepBatch(
        step_id=1,
        new=(new(8, tuple(range(200, 209))),),
        chunks=(
            Chunk(sequence_id=8, start=0, count=5, new_blocks=(0, 9)),
            Chunk(sequence_id=7, start=6, count=1, new_tokens=(55,)),
        ),
    )
    prepared = run(table, second)
    forward = prepared.forward
    assert forward.token_ids.tolist() == [200, 201, 202, 203, 204, 55]
    assert forward.positions.tolist() == [0, 1, 2, 3, 4, 6]
    assert forward.slots.tolist() == [0, 1, 2, 3, 36, 10]
    assert forward.block_tables.tolist() == [[0, 9], [5, 2]]
    assert (forward.query_lens, forward.context_lens) == ((5, 1), (5, 7))
    # The chunk of 8 ends inside of its prompt: only 7 is sampled from.
    assert forward.last_rows is not None
    assert (forward.last_rows.tolist(), forward.last_lens, forward.logit_rows.tolist()) == ([5], (0, 1), [0])
    assert [state.sequence_id for state in prepared.samples] == [7]


@pytest.mark.parametrize("num_prompt", [9, 4])
def test_no_row_is_sampled_before_the_last_known_token(num_prompt: int) -> None:
    """In the middle of a prompt, or of what was generated before a preemption."""
    batch = StepBatch(
        step_id=0,
        new=(new(1, tuple(range(9)), num_prompt=num_prompt),),
        chunks=(Chunk(sequence_id=1, start=0, count=8, new_blocks=(0, 1)),),
    )
    prepared = run(SequenceTable(), batch)
    assert (prepared.samples, prepared.forward.logit_rows.tolist()) == ((), [])


def test_prompt_logprobs_cover_every_prompt_token_but_the_first_once() -> None:
    table = SequenceTable()
    batches = [
        StepBatch(
            step_id=0,
            new=(new(1, tuple(range(10)), num_prompt=8, prompt_logprobs=0),),
            chunks=(Chunk(sequence_id=1, start=0, count=3, new_blocks=(0, 1, 2)),),
        ),
        StepBatch(step_id=1, chunks=(Chunk(sequence_id=1, start=3, count=4),)),
        StepBatch(step_id=2, chunks=(Chunk(sequence_id=1, start=7, count=3),)),
    ]
    seen = [run(table, batch) for batch in batches]
    covered = [prompt.start + i for step in seen for prompt in step.prompts for i in range(prompt.count)]
    assert covered == [1, 2, 3, 4, 5, 6, 7]
    # Each in the row of the token before it.
    for step in seen:
        rows = step.forward.logit_rows.tolist()
        for prompt in step.prompts:
            assert step.forward.last_rows is None
            positions = step.forward.positions[rows[prompt.row : prompt.row + prompt.count]].tolist()
            assert positions == [prompt.start - 1 + i for i in range(prompt.count)]
    assert [step.sample_rows for step in seen] == [(), (), (0,)]
    assert [step.forward.last_lens for step in seen] == [(3,), (4,), (1,)]


def test_dropped_sequences_are_forgotten_before_new_ones_come() -> None:
    table = SequenceTable()
    chunk = Chunk(sequence_id=1, start=0, count=2, new_blocks=(3,))
    run(table, StepBatch(step_id=0, new=(new(1, (5, 6)),), chunks=(chunk,)))
    # Preempted and back in one step: its old blocks and tokens must be gone.
    prepared = run(table, StepBatch(step_id=1, dropped=(1, 99), new=(new(1, (7, 8)),), chunks=(chunk,)))
    assert prepared.forward.block_tables.tolist() == [[3]]
    assert prepared.forward.token_ids.tolist() == [7, 8]
    assert table.apply(StepBatch(step_id=2, dropped=(1,), chunks=())) == []
    assert len(table) == 0


@settings(max_examples=20, deadline=None)
@given(
    plans=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=5),
    order=st.permutations(range(64)),
)
def test_slots_and_rows_against_token_by_token(plans: list[tuple[int, int]], order: list[int]) -> None:
    """Each plan: (start, count) of a chunk, everything before it computed elsewhere."""
    free = list(order)
    news, chunks = [], []
    for sequence_id, (start, count) in enumerate(plans):
        blocks = tuple(free.pop() for _ in range(-(-(start + count) // BLOCK_SIZE)))
        news.append(new(sequence_id, tuple(range(1000 * sequence_id, 1000 * sequence_id + start + count))))
        chunks.append(Chunk(sequence_id=sequence_id, start=start, count=count, new_blocks=blocks))
    prepared = run(SequenceTable(), StepBatch(step_id=0, new=tuple(news), chunks=tuple(chunks)))
    last_rows = prepared.forward.last_rows
    last_rows = range(prepared.forward.num_tokens) if last_rows is None else last_rows.tolist()
    assert len(last_rows) == sum(prepared.forward.last_lens) == len(chunks)
    token = 0
    for row, chunk in enumerate(chunks):
        for position in range(chunk.start, chunk.start + chunk.count):
            block = chunk.new_blocks[position // BLOCK_SIZE]
            assert prepared.forward.token_ids[token] == 1000 * row + position
            assert prepared.forward.positions[token] == position
            assert prepared.forward.slots[token] == block * BLOCK_SIZE + position % BLOCK_SIZE
            token += 1
        assert last_rows[prepared.forward.logit_rows[row]] == token - 1
        assert prepared.forward.block_tables[row, : len(chunk.new_blocks)].tolist() == list(chunk.new_blocks)
    assert prepared.forward.num_tokens == token


def test_what_goes_to_a_device_goes_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none here but `meta`, which forgets the numbers: they are seen on their way."""
    seen: list[torch.Tensor] = []
    to = torch.Tensor.to

    def watched(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        seen.append(self)
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    numbers = [torch.arange(3), torch.arange(6).view(2, 3), torch.empty(0, dtype=torch.int64), torch.tensor([9])]
    there = to_device(numbers, torch.device("meta"))
    assert [(part.shape, part.dtype, part.device.type) for part in there] == [
        (tensor.shape, torch.int64, "meta") for tensor in numbers
    ]
    assert [tensor.tolist() for tensor in seen] == [[0, 1, 2, 0, 1, 2, 3, 4, 5, 9]]
    starts = [part.storage_offset() for part in there]
    assert starts == [0, 3, 9, 9]
