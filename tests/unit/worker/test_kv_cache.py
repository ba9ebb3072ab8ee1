"""The memory of keys and values is given beforehand, and giving it can be ended."""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
import threading

import pytest
import torch

from qwen_ray.worker import kv_cache


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> None:
    """Where the system refuses its memory, a failed test says why."""
    caplog.set_level(logging.INFO, logger=kv_cache.__name__)


def empty_cache() -> torch.Tensor:
    """64 MiB straight from the system, which has given nothing of them: malloc may have had its memory before."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return torch.frombuffer(mmap.mmap(-1, 64 * 2**20, flags=flags), dtype=torch.uint8)


def resident(*caches: torch.Tensor) -> int:
    """Bytes of `caches` that the system has given: of these alone, whatever else this process does."""
    num_pages = 0
    for cache in caches:
        pages = (ctypes.c_ubyte * (cache.nbytes // mmap.PAGESIZE))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(cache.data_ptr()), ctypes.c_size_t(cache.nbytes), pages) == 0
        num_pages += sum(page & 1 for page in pages)
    return num_pages * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is given as it is used")
def test_memory_is_held_with_what_was_written_to_it() -> None:
    cache = empty_cache()
    cache[40 * 2**20] = 7
    kv_cache.hold([cache], threading.Event())
    assert resident(cache) == cache.nbytes
    assert cache[40 * 2**20] == 7
    assert cache.count_nonzero() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is given as it is used")
def test_whoever_closes_need_not_wait_for_all_of_it() -> None:
    cache = empty_cache()
    stop = threading.Event()
    stop.set()
    kv_cache.hold([cache], stop)
    assert resident(cache) < 16 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is given as it is used")
def test_the_first_blocks_of_all_come_first_and_others_are_let_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "PATIENCE_SECONDS", 0.0)
    caches = [empty_cache() for _ in range(2)]
    stop = threading.Event()
    looks = 0

    def is_idle() -> bool:
        nonlocal looks
        looks += 1
        if looks == 8:
            stop.set()
        return looks % 2 == 0

    kv_cache.hold(caches, stop, is_idle)
    assert looks == 8
    given = resident(*caches)
    assert 12 * 2**20 < given < 24 * 2**20
    for cache in caches:
        cache[: 7 * 2**20] = 1
    assert resident(*caches) - given < 6 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is given as it is used")
def test_at_first_nothing_is_taken_from_those_who_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "CHECK_SECONDS", 0.001)
    cache = empty_cache()
    stop = threading.Event()
    looks = 0

    def is_idle() -> bool:
        nonlocal looks
        looks += 1
        if looks == 20:
            stop.set()
        return False

    kv_cache.hold([cache], stop, is_idle)
    assert looks == 20
    assert resident(cache) == 0
