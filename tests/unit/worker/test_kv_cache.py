"""The memory of keys and values is given beforehand, and giving it can be ended."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_ray.worker import kv_cache


def resident() -> int:
    """Bytes of memory that this process has."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Anonymous"].split()[0]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is given as it is used")
def test_memory_is_held_with_what_was_written_to_it() -> None:
    cache = torch.from_numpy(np.zeros(64 * 2**20, dtype=np.uint8))
    cache[40 * 2**20] = 7
    before = resident()
    kv_cache.hold([cache], threading.Event())
    assert resident() - before > 48 * 2**20
    assert cache[40 * 2**20] == 7
    assert cache.count_nonzero() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is given as it is used")
def test_whoever_closes_need_not_wait_for_all_of_it() -> None:
    cache = torch.from_numpy(np.zeros(64 * 2**20, dtype=np.uint8))
    stop = threading.Event()
    stop.set()
    before = resident()
    kv_cache.hold([cache], stop)
    assert resident() - before < 16 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is given as it is used")
def test_the_first_blocks_of_all_come_first_and_others_are_let_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "PATIENCE_SECONDS", 0.0)
    caches = [torch.from_numpy(np.zeros(64 * 2**20, dtype=np.uint8)) for _ in range(2)]
    stop = threading.Event()
    looks = 0

    def is_idle() -> bool:
        nonlocal looks
        looks += 1
        if looks == 8:
            stop.set()
        return looks % 2 == 0

    before = resident()
    kv_cache.hold(caches, stop, is_idle)
    assert looks == 8
    assert 12 * 2**20 < resident() - before < 24 * 2**20
    given = resident()
    for cache in caches:
        cache[: 7 * 2**20] = 1
    assert resident() - given < 6 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is given as it is used")
def test_at_first_nothing_is_taken_from_those_who_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "CHECK_SECONDS", 0.001)
    cache = torch.from_numpy(np.zeros(64 * 2**20, dtype=np.uint8))
    stop = threading.Event()
    looks = 0

    def is_idle() -> bool:
        nonlocal looks
        looks += 1
        if looks == 20:
            stop.set()
        return False

    before = resident()
    kv_cache.hold([cache], stop, is_idle)
    assert looks == 20
    assert resident() - before < 2**20
