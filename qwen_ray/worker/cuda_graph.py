"""Steps of one token for each sequence, as CUDA graphs: one launch in place of hundreds, which take the host longer
than the device.

Knows which steps are alike, and how to make them so: rows that are nobody's are added, up to a size. A graph is
captured when a step of its size first comes, so nobody waits for graphs at start. What a step computes is the model's.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable

import torch

from qwen_ray.core.plan import MOST_GRAPH_ROWS, EngineConfig
from qwen_ray.layers.batch import ForwardBatch
from qwen_ray.models.stage import Stage

SIZES = (1, 2, 4, 8, *range(16, 64, 8), *range(64, 128, 16), *range(128, MOST_GRAPH_ROWS + 1, 32))
SHORT_CONTEXT = 4096  # tokens; each longer kind of graph is for 8 times as many
NOBODY = -1  # as a slot or a position

logger = logging.getLogger(__name__)

Run = Callable[[], torch.Tensor]


class Graph:
    """A step of `size` rows and contexts of up to `max_context` tokens, over tensors that stay where they are."""

    def __init__(self, model: Stage, size: int, max_context: int, block_size: int, device: torch.device) -> None:
        def full(*shape: int, value: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self._tables = full(size, -(-max_context // block_size), dtype=torch.int32)
        self._batch = ForwardBatch(
            token_ids=full(size),
            positions=full(size, value=NOBODY),
            slots=full(size, value=NOBODY),
            block_tables=self._tables,
            last_rows=None,
            logit_rows=torch.arange(size, device=device),
            query_lens=(1,) * size,
            last_lens=(1,) * size,
            context_lens=(0,) * size,  # the plan has them
        )
        self._model = model
        self._plan = model.plan_decodes(self._tables, max_context)
        self.replay: Run | None = None

    def take(self, batch: ForwardBatch) -> None:
        """The rows of a step, and nobody's behind them."""
        own, count = self._batch, batch.num_tokens
        for to, rows, nobody in (
            (own.token_ids, batch.token_ids, 0),
            (own.positions, batch.positions, NOBODY),
            (own.slots, batch.slots, NOBODY),
            (self._plan.lens, batch.positions + 1, 0),
        ):
            to[:count].copy_(rows)
            to[count:].fill_(nobody)
        width = min(batch.block_tables.shape[1], self._tables.shape[1])  # blocks may be there before their tokens
        self._tables[:count, :width].copy_(batch.block_tables[:, :width])

    def compute(self) -> torch.Tensor:
        """[size, hidden], of what was taken."""
        hidden = self._model.hidden(self._batch, self._plan)
        assert hidden is not None, "the only stage"
        return hidden


class DecodeGraphs:
    """`hidden` is the model's, for a rank that has no peers."""

    def __init__(self, model: Stage, engine: EngineConfig, device: torch.device, capture: Callable[[Run], Run]) -> None:
        """`capture` makes a graph of what a call launches, and returns what launches it again, into the same tensor."""
        self._model = model
        self._engine = engine
        self._device = device
        self._capture = capture
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._is_able = True

    def hidden(self, batch: ForwardBatch) -> torch.Tensor | None:
        """As `Stage.hidden`."""
        key = self._kind(batch)
        if key is None:
            return self._model.hidden(batch)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = Graph(self._model, *key, self._engine.block_size, self._device)
        graph.take(batch)
        if graph.replay is not None:
            return graph.replay()[batch.logit_rows]
        hidden = graph.compute()[batch.logit_rows]  # and its kernels are compiled now, which no capture could wait for
        try:
            graph.replay = self._capture(graph.compute)
        except RuntimeError as error:
            logger.warning("steps are launched kernel by kernel from now on: no CUDA graph could be made: %s", error)
            self._graphs.clear()
            self._is_able = False
        return hidden

    def _kind(self, batch: ForwardBatch) -> tuple[int, int] | None:
        """Rows and longest context of the graph that such a step takes; None: it takes none."""
        count = batch.num_tokens
        most = min(MOST_GRAPH_ROWS, self._engine.max_num_seqs)
        if not self._is_able or batch.last_rows is not None or not 0 < count == batch.num_sequences <= most:
            return None
        context = SHORT_CONTEXT
        while context < max(batch.context_lens):
            context *= 8
        return SIZES[bisect_left(SIZES, count)], min(context, self._engine.max_model_len)


def capturer() -> Callable[[Run], Run]:
    """Captures on this process's CUDA device. All graphs share the memory of what lies between their kernels."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Run) -> Run:
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile: the KV cache's, and NCCL's.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay

    return capture
