"""One rank: its shard of the model, its KV cache, its part of every step, and its figures.

Knows its `ReplicaSpec` and its number. Does not know what carries steps to it: `local.py` calls it in process, the
cluster's actors over the network. `load`, each rank for itself; then, all ranks of a group together, `join`, `warm_up`,
and `execute` for each step with `move_experts` between steps; `close`. After a failure of another rank, `join` again:
weights and KV memory stay. Not thread-safe, `abort`, `stats` and `is_waiting` excepted.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import platform
import resource
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from qwen_ray.core.errors import CheckpointError
from qwen_ray.core.plan import EngineConfig, Rendezvous, ReplicaSpec, split_evenly
from qwen_ray.core.request import SamplingParams
from qwen_ray.core.stats import RankStats
from qwen_ray.core.step import Chunk, MoveExperts, NewSequence, StepBatch, StepResult
from qwen_ray.grammar.matcher import GrammarCompiler
from qwen_ray.layers.batch import ForwardBatch
from qwen_ray.models.registry import build
from qwen_ray.models.stage import Stage
from qwen_ray.parallel.groups import Groups
from qwen_ray.worker import kv_cache
from qwen_ray.worker.cuda_graph import DecodeGraphs, capturer
from qwen_ray.worker.runner import Runner
from qwen_ray.worker.weights import open_checkpoint

CPU_WARM_UP_TOKENS = 8
WARM_UP_DECODES = (1, 32)  # sequences
HOLD_AFTER_SECONDS = 10.0  # others start beside this rank, and somebody waits for their first answer
IDLE_SECONDS = 0.5  # after a step

logger = logging.getLogger(__name__)


class Worker:
    """See the module. `stats()` is valid at any time, from any thread."""

    def __init__(self, spec: ReplicaSpec, rank: int) -> None:
        self.shard = spec.plan.shard(spec.config, rank)
        self._spec = spec
        self._device = torch.device("cuda", 0) if spec.device == "cuda" else torch.device(spec.device)
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._groups = Groups(self.shard, self._device)
        self._model: Stage | None = None
        self._hidden: Callable[[ForwardBatch], torch.Tensor | None] | None = None
        self._runner: Runner | None = None
        # What nobody waits for: the KV cache gets its memory, the vocabulary is read for grammars.
        self._beside = ThreadPoolExecutor(max_workers=2, thread_name_prefix="beside")
        self._closed = threading.Event()
        self._last_busy = 0.0  # of `time.perf_counter`
        self._compiler: Future[GrammarCompiler | None] = Future()
        self._thread: int | None = None
        self._stats = RankStats(
            rank=rank,
            stage=self.shard.stage,
            tp_rank=self.shard.tp_rank,
            dp_rank=self.shard.dp_rank,
            ep_rank=self.shard.ep_rank,
            expert_tp_rank=self.shard.expert_tp_rank,
            first_layer=self.shard.layers.start,
            pid=os.getpid(),
            node=platform.node(),
            device=spec.device,
        )

    def load(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Build this rank's part of the model and fill it, and make its KV cache.

        `on_progress` hears (bytes done, bytes in all), as they are read. Holds at most the shard, the cache and one
        tensor. Raises CheckpointError.
        """
        self._use_threads()
        started = time.perf_counter()
        spec = self._spec
        model = build(
            spec.config,
            self.shard,
            self._groups,
            self._device,
            self._dtype,
            max_len=spec.engine.max_model_len,
            quantization=spec.quantization,
            deterministic=spec.deterministic,
        )
        total = model.num_weights * self._dtype.itemsize
        done = 0

        def on_read(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            on_progress(done, total)

        checkpoint = open_checkpoint(
            Path(spec.path), spec.config, self._dtype, spec.load_format, device=self._device, on_read=on_read
        )
        kv_bytes = kv_cache.allocate(
            model.attentions,
            num_blocks=spec.engine.num_blocks,
            block_size=spec.engine.block_size,
            dtype=self._dtype,
            device=self._device,
        )
        model.load(checkpoint)
        checkpoint.check_extra(self.shard.layers)
        give_back_memory()
        weights_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self._compiler = self._beside.submit(self._load_compiler)
        caches = [cache for attention in model.attentions for cache in attention.kv_cache]
        self._beside.submit(kv_cache.hold, caches, self._closed, self._is_idle, HOLD_AFTER_SECONDS)
        self._model = model
        self._hidden = self._graphs(model)
        self._runner = self._new_runner(model)
        self._stats = replace(
            self._stats,
            weights_bytes=weights_bytes,
            kv_bytes=kv_bytes,
            bytes_read=self._stats.bytes_read + checkpoint.bytes_read,
            load_seconds=time.perf_counter() - started,
            num_loads=self._stats.num_loads + 1,
        )
        logger.info(
            "rank %d: %d MB of weights in %.1f s", self.shard.rank, weights_bytes // 10**6, self._stats.load_seconds
        )

    def _is_idle(self) -> bool:
        return time.perf_counter() - self._last_busy > IDLE_SECONDS

    def _load_compiler(self) -> GrammarCompiler | None:
        """None on ranks that do not sample, and where there is no tokenizer: then no sequence may have a grammar."""
        if not self.shard.samples:
            return None
        spec = self._spec
        try:
            return GrammarCompiler.load(Path(spec.path), spec.load_format, spec.config.vocab_size)
        except CheckpointError as error:
            logger.warning("rank %d: no structured output: %s", self.shard.rank, error)
            return None

    def _new_runner(self, model: Stage) -> Runner:
        block_size = self._spec.engine.block_size
        compiler = self._compiler.result
        return Runner(model, block_size=block_size, device=self._device, compiler=compiler, hidden=self._hidden)

    def _graphs(self, model: Stage) -> Callable[[ForwardBatch], torch.Tensor | None] | None:
        """Steps of a rank that has peers are launched kernel by kernel."""
        if self._device.type != "cuda" or self.shard.world_size > 1 or not model.plans_decodes:
            return None
        return DecodeGraphs(model, self._spec.engine, self._device, capturer()).hidden

    def join(self, rendezvous: Rendezvous) -> None:
        """Meet the other ranks of the group, and forget all sequences. May be done again. Raises as `Groups.join`."""
        assert self._runner is not None, "load first"
        self._groups.join(rendezvous)
        self._runner.forget()

    def warm_up(self) -> int:
        """Run a first step: what cannot fit fails now, not under load. Returns how many tokens it had.

        On a GPU it is the largest step there can be, and then decodes of few and of some sequences, whose kernels are
        others: none is compiled under load. On a CPU, where that would take long and the memory goes back to the
        system anyway, it is a small one: libraries set themselves up. Every dp rank takes the same ones.
        """
        assert self._model is not None, "load first"
        self._use_threads()
        engine = self._spec.engine
        most = engine.max_num_batched_tokens if self._device.type == "cuda" else CPU_WARM_UP_TOKENS
        batch = first_step(engine, most)
        block_size, device = engine.block_size, self._device
        Runner(self._model, block_size=block_size, device=device).run(batch)
        for count in WARM_UP_DECODES if device.type == "cuda" else ():
            decodes = first_step(engine, min(count, engine.max_num_seqs))
            Runner(self._model, block_size=block_size, device=device, hidden=self._hidden).run(decodes)
        give_back_memory()
        self._runner = self._new_runner(self._model)
        return batch.num_tokens

    def execute(self, batch: StepBatch) -> StepResult | None:
        """Run this rank's part of one step; the answer comes from the one rank of a dp rank that samples."""
        assert self._runner is not None, "load first"
        self._use_threads()
        started = time.perf_counter()
        self._last_busy = math.inf
        result = self._runner.run(batch)
        self._last_busy = time.perf_counter()
        seconds = self._last_busy - started
        self._stats = replace(
            self._stats,
            num_steps=self._stats.num_steps + 1,
            num_tokens=self._stats.num_tokens + batch.num_tokens,
            step_seconds=self._stats.step_seconds + seconds,
        )
        return None if result is None else replace(result, seconds=seconds)

    def move_experts(self, move: MoveExperts) -> None:
        """Give one layer's experts their new slots, between two steps; all ranks of its stage exchange weights."""
        assert self._model is not None, "load first"
        self._use_threads()
        num_received = self._model.move_experts(move.layer, move.slots)
        self._stats = replace(self._stats, num_moved_experts=self._stats.num_moved_experts + num_received)

    def stats(self) -> RankStats:
        runner = self._runner
        expert_tokens = () if runner is None else runner.expert_tokens()
        return replace(self._stats, expert_tokens=expert_tokens, memory_bytes=memory_bytes(self._device))

    def expert_slots(self) -> dict[int, tuple[tuple[int, ...], ...]]:
        """Where the experts of this rank's sparse layers lie, as `ExpertPlacement.slots` says it, by layer."""
        return {} if self._model is None else self._model.expert_slots()

    @property
    def is_waiting(self) -> bool:
        """Whether this rank is in an operation with others; see `Groups.is_waiting`."""
        return self._groups.is_waiting

    def survives(self, error: Exception) -> bool:
        """Whether weights and KV memory are as they were after `error`. A process loses its CUDA device for good."""
        return not isinstance(error, torch.AcceleratorError) and "CUDA error" not in str(error)

    def abort(self) -> None:
        """Make a step, or a `join`, that waits for its peers raise. From any thread."""
        self._groups.abort()

    def close(self) -> None:
        """Leave the group and let go of the memory. A second call does nothing."""
        self._runner = None
        self._hidden = None
        self._model = None
        self._closed.set()
        self._beside.shutdown()
        self._compiler = Future()
        self._groups.close()
        give_back_memory()

    def _use_threads(self) -> None:
        # OpenMP keeps the number of threads per calling thread: it has to be said in the one that computes.
        if self._thread != threading.get_ident():
            torch.set_num_threads(self._spec.num_threads)
            self._thread = threading.get_ident()


def first_step(engine: EngineConfig, most: int) -> StepBatch:
    """Up to `most` tokens, no more than `engine` allows in one step, over as many sequences as it allows."""
    num_tokens = min(most, engine.max_num_batched_tokens)
    parts = split_evenly(num_tokens, min(engine.max_num_seqs, num_tokens))
    counts = [min(len(part), engine.max_model_len) for part in parts]
    return StepBatch(
        step_id=0,
        new=tuple(
            NewSequence(
                sequence_id=i,
                token_ids=(0,) * count,
                num_prompt_tokens=count,
                sampling=SamplingParams(temperature=1.0, top_p=0.9),
                seed=0,
                stop_token_ids=(),
            )
            for i, count in enumerate(counts)
        ),
        chunks=tuple(
            Chunk(
                sequence_id=i,
                start=0,
                count=count,
                # What is written there is never read: sequences may share blocks.
                new_blocks=tuple(b % engine.num_blocks for b in range(-(-count // engine.block_size))),
            )
            for i, count in enumerate(counts)
        ),
    )


def memory_bytes(device: torch.device) -> int:
    """All that this process holds: resident memory on CPU, torch's allocations on CUDA."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def give_back_memory() -> None:
    """Return what was freed to the system: glibc would keep it, and the rank would hold more than was planned."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
