"""Steps of attention with random queries, for the kernels of CUDA and for the reference."""

from __future__ import annotations

from dataclasses import replace

import interpreted
import torch

from qwen_ray.kernels import reference
from qwen_ray.kernels.cuda import attention

interpreted.improve()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SPLIT = 32  # tokens, in place of the 256 that would make tests long


class Step:
    """Sequences with random queries, and caches in which all that is nobody's is NaN."""

    def __init__(
        self,
        query_lens: tuple[int, ...],
        context_lens: tuple[int, ...],
        *,
        heads: tuple[int, int] = (2, 1),
        dim: int = 16,
        dtype: torch.dtype = torch.float32,
        block_size: int = 16,
        num_shared: int = 0,
    ) -> None:
        dice = torch.Generator().manual_seed(sum(context_lens))
        counts = [-(-length // block_size) for length in context_lens]
        num_blocks = sum(counts) + 3
        self.query_lens, self.context_lens, self.block_size = query_lens, context_lens, block_size
        self.scale = dim**-0.5
        self.tables = torch.zeros(len(counts), max(counts) + 2, dtype=torch.int64)
        blocks = torch.randperm(num_blocks, generator=dice)
        for s, part in enumerate(blocks.split([*counts, 3])[:-1]):
            self.tables[s, : counts[s]] = part
            common = min(num_shared, context_lens[s] // block_size, context_lens[0] // block_size)
            self.tables[s, :common] = self.tables[0, :common]
        self.q = torch.randn(sum(query_lens), heads[0], dim, generator=dice).to(dtype)
        self.k, self.v = (torch.full((num_blocks, block_size, heads[1], dim), torch.nan, dtype=dtype) for _ in range(2))
        for table, length in zip(self.tables, context_lens, strict=True):
            tokens = torch.arange(length)
            where = table[tokens // block_size], tokens % block_size
            for cache in (self.k, self.v):
                cache[where] = torch.randn(length, heads[1], dim, generator=dice).to(dtype)

    def attend(self, plan: attention.AttentionPlan, q: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (x.to(DEVICE) for x in (self.q if q is None else q, self.k, self.v))
        return attention.paged_attention(q, k, v, plan, self.scale).cpu()

    def run(self, split: int = SPLIT, *, has_decodes: bool = True) -> torch.Tensor:
        of_step = self.tables.to(DEVICE), self.query_lens, self.context_lens, self.block_size
        plan = attention.plan_attention(*of_step, has_decodes=has_decodes)
        return self.attend(replace(plan, split=split))

    def expected(self) -> torch.Tensor:
        plan = reference.plan_attention(self.tables, self.query_lens, self.context_lens, self.block_size)
        q, k, v = self.q.float(), self.k.float(), self.v.float()
        return reference.paged_attention(q, k, v, plan, self.scale).to(self.q.dtype)

    def check(self, split: int = SPLIT) -> None:
        tolerance = TOLERANCE[self.q.dtype]
        torch.testing.assert_close(self.run(split), self.expected(), atol=tolerance, rtol=tolerance)
