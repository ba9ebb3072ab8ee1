"""Processes that play ranks: started once, told what to do by the tests. Not a test itself."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import MappingProxyType
from typing import Any

import torch

from qwen_ray.core.model_config import ModelConfig, Quantization
from qwen_ray.core.plan import ParallelPlan, Rendezvous, Shard, Span
from qwen_ray.core.step import MoveExperts
from qwen_ray.layers.batch import ForwardBatch
from qwen_ray.models import registry
from qwen_ray.parallel.groups import Groups

BLOCK_SIZE = 4
BLOCKS_PER_SEQUENCE = 8
CPU = torch.device("cpu")


class Ranks:
    """Up to `count` processes; `run` calls one function on the first `world_size` of them at the same time."""

    def __init__(self, count: int) -> None:
        # A fork server imports torch once; a fork of this process would take its threads' locks along.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["qwen_ray.models.registry"])
        self._members = [self._start(rank) for rank in range(count)]

    def _start(self, rank: int) -> tuple[BaseProcess, Connection]:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(there, rank), daemon=True)
        process.start()
        there.close()
        return process, here

    def _restart(self, rank: int) -> None:
        process, pipe = self._members[rank]
        pipe.close()
        process.join(10)
        self._members[rank] = self._start(rank)

    def run(
        self, world_size: int, function: Callable[..., Any], *args: Any, dying: frozenset[int] = frozenset()
    ) -> list[Any]:
        """`function(rank, *args)` on every rank; their answers, or AssertionError with the tracebacks.

        The ranks `dying` must die of it; they answer None, and are started anew.
        """
        members = self._members[:world_size]
        for _, pipe in members:
            pipe.send((function, args))
        answers = []
        for rank, (_, pipe) in enumerate(members):
            assert pipe.poll(60), f"rank {rank} gave no answer within 60 s"
            try:
                answers.append(pipe.recv())
            except EOFError:
                assert rank in dying, f"rank {rank} died"
                answers.append((True, None))
                self._restart(rank)
        failed = [f"rank {rank} failed:\n{answer}" for rank, (ok, answer) in enumerate(answers) if not ok]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for process, pipe in self._members:
            pipe.close()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(pipe: Connection, rank: int) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(rank, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class Tensors:
    """A Checkpoint of tensors in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def read(
        self, name: str, shape: tuple[int, ...], *, rows: Span | None = None, columns: Span | None = None
    ) -> torch.Tensor:
        tensor = self._tensors[name]
        assert tuple(tensor.shape) == shape, f"{name} is {tuple(tensor.shape)}, asked for as {shape}"
        if rows is not None:
            tensor = tensor[rows.start : rows.stop]
        if columns is not None:
            tensor = tensor[:, columns.start : columns.stop]
        return tensor.clone()

    def read_four_bits(self, *_asked: object, **_cut: object) -> None:
        return None


Chunks = list[tuple[int, int, int]]  # (sequence, start, count)
Steps = list[tuple[Chunks, list[int]]]  # and the rows that want logits


def last_lens(chunks: Chunks, logit_rows: list[int]) -> list[int]:
    """Of how many of its last tokens each chunk wants something behind the last layer."""
    lens = [n for _, _, n in chunks]
    spans = [range(end - n, end) for n, end in zip(lens, accumulate(lens), strict=True)]
    return [span.stop - min([row for row in logit_rows if row in span], default=span.stop) for span in spans]


def make_batch(sequences: list[list[int]], chunks: Chunks, logit_rows: list[int]) -> ForwardBatch:
    """Sequence s has the blocks s, s + S, s + 2 S, …: scattered."""
    count = len(sequences)
    tables = [[s + count * i for i in range(BLOCKS_PER_SEQUENCE)] for s, _, _ in chunks]
    tokens = [t for s, start, n in chunks for t in sequences[s][start : start + n]]
    positions = [p for _, start, n in chunks for p in range(start, start + n)]
    slots = [
        tables[row][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
        for row, (_, start, n) in enumerate(chunks)
        for p in range(start, start + n)
    ]
    lens = tuple(n for _, _, n in chunks)
    contexts = tuple(start + n for _, start, n in chunks)
    ends, last = list(accumulate(lens)), last_lens(chunks, logit_rows)
    last_rows = [row for end, n in zip(ends, last, strict=True) for row in range(end - n, end)]
    return ForwardBatch(
        token_ids=torch.tensor(tokens, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        slots=torch.tensor(slots, dtype=torch.int64),
        block_tables=torch.tensor(tables, dtype=torch.int64),
        last_rows=None if len(last_rows) == len(tokens) else torch.tensor(last_rows, dtype=torch.int64),
        logit_rows=torch.tensor([last_rows.index(row) for row in logit_rows], dtype=torch.int64),
        query_lens=lens,
        last_lens=tuple(last),
        context_lens=contexts,
    )


@dataclass(frozen=True)
class Life:
    """What one rank went through."""

    num_bytes: int  # held
    logits: list[torch.Tensor]  # of each step, where it samples
    expert_tokens: tuple[tuple[int, ...], ...]
    num_moved: int  # experts that came from other ranks


def forward_steps(
    rank: int,
    config: ModelConfig,
    plan: ParallelPlan,
    address: str,
    weights: str,
    sequences: list[list[int]],
    parts: list[Steps],
    moves: Mapping[int, list[MoveExperts]] = MappingProxyType({}),
    dtype: torch.dtype = torch.float32,
    quantization: Quantization = "none",
) -> Life:
    """One rank's life: join, load, run the steps of its dp rank. `moves[i]` happen before step i."""
    shard: Shard = plan.shard(config, rank)
    rendezvous = Rendezvous(address=address, name=f"test{os.path.basename(weights)}")
    groups = Groups(shard, CPU)
    groups.join(rendezvous, timeout=30)
    try:
        model = registry.build(config, shard, groups, CPU, dtype, max_len=64, quantization=quantization)
        model.load(Tensors(torch.load(weights, mmap=True)))
        for attention in model.attentions:
            shape = (len(sequences) * BLOCKS_PER_SEQUENCE, BLOCK_SIZE, attention.num_kv_heads, attention.head_dim)
            # Not zeros: what is read without having been written must not go unnoticed.
            attention.kv_cache = tuple(torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
        logits: list[torch.Tensor] = []
        num_moved = 0
        for i, (chunks, rows) in enumerate(parts[shard.dp_rank]):
            num_moved += sum(model.move_experts(move.layer, move.slots) for move in moves.get(i, ()))
            out = model(make_batch(sequences, chunks, rows))
            assert (out is not None) == shard.samples
            if out is not None:
                logits.append(out.clone())
        return Life(model.num_bytes, logits, model.expert_tokens(), num_moved)
    finally:
        groups.close()
