"""The memory that keys and values live in: one pair of tensors for each of this rank's layers.

Knows sizes. Which block belongs to whom is the engine's business.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from qwen_ray.layers.attention import Attention

MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23  # Linux 5.14: as if every page had been written to, without changing what is in it
PART = 2**21  # bytes at a time: meanwhile no other thread can get memory of its own
BUSY_REST = 20.0  # times as long as it worked, while others compute: 5 % of one core's bandwidth, and over in minutes
PATIENCE_SECONDS = 60.0  # in which only the time is used in which nobody computes
CHECK_SECONDS = 0.1

logger = logging.getLogger(__name__)


def allocate(
    attentions: Sequence[Attention], *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Give each attention layer its `kv_cache`, of zeros; returns the bytes of all of them.

    On a CPU the system has promised that memory and not yet given it: see `hold`.
    """
    num_bytes = 0
    for attention in attentions:
        shape = (num_blocks, block_size, attention.num_kv_heads, attention.head_dim)
        keys, values = (_zeros(shape, dtype, device) for _ in range(2))
        attention.kv_cache = (keys, values)
        num_bytes += keys.nbytes + values.nbytes
    return num_bytes


def hold(
    caches: Sequence[torch.Tensor],
    stop: threading.Event,
    is_idle: Callable[[], bool] = lambda: True,
    after: float = 0.0,
) -> None:
    """Have the system give the memory in `after` seconds, not when the first long request comes, unless `stop` is set.

    In any thread: what is written to the cache meanwhile stays. The first blocks come first, in all of `caches`. It
    takes the bandwidth of those who compute, and nobody waits for it: at first it waits until they are idle, and when
    its patience is over it rests far longer than it works. A GB takes 0.4 s, on a virtual machine whose host gives
    memory slowly ten times that.
    """
    if sys.platform != "linux":
        return
    if stop.wait(after):
        return
    page = os.sysconf("SC_PAGE_SIZE")
    libc = ctypes.CDLL(None, use_errno=True)

    def advise(start: int, num_bytes: int, advice: int) -> bool:
        return libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), advice) == 0

    ends = {tensor.data_ptr() // page * page: tensor.data_ptr() + tensor.nbytes for tensor in caches if tensor.is_cpu}
    for start, end in ends.items():
        advise(start, end - start, MADV_HUGEPAGE)  # where there are none, the others do
    patient_until = time.perf_counter() + PATIENCE_SECONDS
    for part in range(0, max((end - start for start, end in ends.items()), default=0), PART):
        for start, end in ends.items():
            if start + part >= end:
                continue
            while (started := time.perf_counter()) < patient_until and not is_idle():
                if stop.wait(CHECK_SECONDS):
                    return
            if not advise(start + part, min(PART, end - start - part), MADV_POPULATE_WRITE):
                logger.info("the KV cache is not held from the start: %s", os.strerror(ctypes.get_errno()))
                return
            if stop.wait((time.perf_counter() - started) * (1 if is_idle() else BUSY_REST)):
                return


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch would write them, NumPy takes pages that the system promises to be zero.
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
