"""From a StepBatch and the sequences it talks about to the tensors of one forward pass.

A pure function: changes nothing, and knows neither model nor ranks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qwen_ray.core.step import Chunk
from qwen_ray.layers.batch import ForwardBatch
from qwen_ray.worker.sequences import SequenceState


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRows:
    """Logits rows `[row, row + count)` predict prompt tokens `[start, start + count)` of a sequence."""

    state: SequenceState
    row: int
    start: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedBatch:
    """A forward pass, and whose each of its L rows is: `sample_rows[i]` is sampled from for `samples[i]`.

    Rows of `samples` and `prompts` come first; then, one each, those of `scored`, whose logits are asked for, and of
    `embedded`, which want no logits.
    """

    forward: ForwardBatch
    samples: tuple[SequenceState, ...]
    sample_rows: tuple[int, ...]
    prompts: tuple[PromptRows, ...]
    scored: tuple[SequenceState, ...]
    embedded: tuple[SequenceState, ...]


def prepare(
    chunks: Sequence[Chunk], states: Sequence[SequenceState], *, block_size: int, device: torch.device
) -> PreparedBatch:
    """`states[i]` is the sequence of `chunks[i]`, what the step brings already taken in. There may be none."""
    token_ids, positions = array("q"), array("q")
    last_rows, logit_rows = array("q"), array("q")
    last_lens: list[int] = []
    samples: list[SequenceState] = []
    sample_rows: list[int] = []
    prompts: list[PromptRows] = []
    scored: list[SequenceState] = []
    embedded: list[SequenceState] = []
    scored_rows, embedded_rows = array("q"), array("q")
    for chunk, state in zip(chunks, states, strict=True):
        first, stop = len(last_rows), chunk.start + chunk.count
        token_ids += state.token_ids[chunk.start : stop]
        positions.extend(range(chunk.start, stop))
        last_lens.append(_num_last(chunk, state))
        last_rows.extend(range(len(token_ids) - last_lens[-1], len(token_ids)))
        if state.sampling.prompt_logprobs is not None:
            # Token p is predicted at position p - 1; the first has no prediction, the last prompt position is sampled.
            count = min(stop + 1, state.num_prompt_tokens) - (chunk.start + 1)
            if count > 0:
                prompts.append(PromptRows(state=state, row=len(logit_rows), start=chunk.start + 1, count=count))
                logit_rows.extend(range(first, first + count))
        if stop != state.num_tokens:
            continue
        if state.pooling is not None:
            asking, rows = (scored, scored_rows) if state.pooling.token_ids else (embedded, embedded_rows)
            asking.append(state)
            rows.append(len(last_rows) - 1)
        else:
            samples.append(state)
            sample_rows.append(len(logit_rows))
            logit_rows.append(len(last_rows) - 1)
    logit_rows += scored_rows + embedded_rows
    leaving = _Leaving(last_lens=tuple(last_lens), last_rows=last_rows, logit_rows=logit_rows)
    return PreparedBatch(
        forward=_forward_batch(chunks, states, token_ids, positions, leaving, block_size, device),
        samples=tuple(samples),
        sample_rows=tuple(sample_rows),
        prompts=tuple(prompts),
        scored=tuple(scored),
        embedded=tuple(embedded),
    )


def _num_last(chunk: Chunk, state: SequenceState) -> int:
    """Of how many of the chunk's last tokens something is wanted behind the last layer."""
    if state.sampling.prompt_logprobs is not None and chunk.start + 1 < state.num_prompt_tokens:
        return chunk.count
    return int(chunk.start + chunk.count == state.num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Leaving:
    """See ForwardBatch."""

    last_lens: tuple[int, ...]
    last_rows: array[int]
    logit_rows: array[int]


def _forward_batch(
    chunks: Sequence[Chunk],
    states: Sequence[SequenceState],
    token_ids: array[int],
    positions: array[int],
    leaving: _Leaving,
    block_size: int,
    device: torch.device,
) -> ForwardBatch:
    query_lens = tuple(chunk.count for chunk in chunks)
    context_lens = tuple(chunk.start + chunk.count for chunk in chunks)
    width = max((len(state.blocks) for state in states), default=1)
    tables = array("q")
    for state in states:
        tables += state.blocks
        tables.extend(array("q", [0]) * (width - len(state.blocks)))
    block_tables = to_tensor(tables).view(len(states), width)
    where = to_tensor(positions)
    owner = torch.repeat_interleave(torch.tensor(query_lens, dtype=torch.int64))  # [T]: the sequence of each token
    slots = block_tables[owner, where // block_size] * block_size + where % block_size
    given = (
        to_tensor(token_ids),
        where,
        slots,
        block_tables,
        to_tensor(leaving.last_rows),
        to_tensor(leaving.logit_rows),
    )
    token_ids_there, positions_there, slots_there, tables_there, last_rows, logit_rows = to_device(given, device)
    return ForwardBatch(
        token_ids=token_ids_there,
        positions=positions_there,
        slots=slots_there,
        block_tables=tables_there,
        last_rows=None if leaving.last_lens == query_lens else last_rows,
        logit_rows=logit_rows,
        query_lens=query_lens,
        last_lens=leaving.last_lens,
        context_lens=context_lens,
    )


def to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> Sequence[torch.Tensor]:
    """The same [...] int64 tensors there: in one copy, which nobody waits for, as each one costs the host some time."""
    if device.type == "cpu":
        return tensors
    sizes = [tensor.numel() for tensor in tensors]
    room = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    torch.cat([tensor.flatten() for tensor in tensors], out=room)
    parts = room.to(device, non_blocking=True).split(sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def to_tensor(values: array[int]) -> torch.Tensor:
    """[len(values)] int64 over the same memory."""
    return torch.frombuffer(values, dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)
