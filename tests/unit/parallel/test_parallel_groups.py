"""Sums and gathers among threads: shared memory, TCP, and one rank alone."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore

from qwen_ray.parallel import shared_memory
from qwen_ray.parallel.board import Board, Wait
from qwen_ray.parallel.collectives import Alone, Connection, Nccl, TensorGroup
from qwen_ray.parallel.link import Listener, connect
from qwen_ray.parallel.meeting import local_address
from qwen_ray.parallel.mesh import Mesh
from qwen_ray.parallel.shared_memory import SharedMemory

Result = TypeVar("Result")
Make = Callable[[Board, int, int], TensorGroup | None]
CAPACITY = 256  # bytes: messages here go in several pieces


def make_shared(board: Board, rank: int, size: int, timeout: float = 20.0) -> SharedMemory | None:
    return SharedMemory.join(board, rank, size, timeout=timeout, capacity=CAPACITY)


def make_mesh(board: Board, rank: int, size: int, timeout: float = 20.0) -> Mesh:
    return Mesh.join(board, rank, size, "127.0.0.1", timeout)


def make_nccl(board: Board, rank: int, size: int) -> Nccl:
    """Its logic over gloo, which has the same operations for CPU tensors; NCCL itself needs devices."""
    connection = dist.ProcessGroupGloo(board.store, rank, size, timeout=timedelta(seconds=20))
    return Nccl(cast(Connection, connection))


def on_all(size: int, function: Callable[[int], Result]) -> list[Result]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(function, range(size)))


def join_all(make: Make, size: int) -> list[Any]:
    board = Board(HashStore(), Wait(20))
    return on_all(size, lambda rank: make(board, rank, size))


OF_CPUS = [(make_shared, 2), (make_shared, 3), (make_mesh, 2), (make_mesh, 4)]


@pytest.fixture(scope="module", params=OF_CPUS)
def groups(request: pytest.FixtureRequest) -> Iterator[list[TensorGroup]]:
    make, size = request.param
    members = join_all(make, size)
    yield members
    for member in members:
        member.close()


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
shapes = st.tuples(st.integers(0, 9), st.integers(1, 40))


@given(dtype=dtypes, some_shapes=st.lists(shapes, min_size=1, max_size=4), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_all_reduce_adds_in_rank_order(
    groups: list[TensorGroup], dtype: torch.dtype, some_shapes: list[tuple[int, int]], seed: int
) -> None:
    """Several in a row, so that the halves of the slots are used again; all ranks get the same bits."""
    size = len(groups)
    generator = torch.Generator().manual_seed(seed)
    inputs = [[torch.randn(shape, generator=generator).to(dtype) for shape in some_shapes] for _ in range(size)]
    outputs = on_all(size, lambda rank: [groups[rank].all_reduce(x.clone()) for x in inputs[rank]])
    for i in range(len(some_shapes)):
        total = inputs[0][i].float()
        for rank in range(1, size):
            total = total + inputs[rank][i].float()
        for rank in range(size):
            assert torch.equal(outputs[rank][i], total.to(dtype))


@given(num_rows=st.integers(0, 5), widths=st.lists(st.integers(1, 90), min_size=4, max_size=4))
@settings(max_examples=15, deadline=None)
def test_gather_sets_columns_side_by_side(groups: list[TensorGroup], num_rows: int, widths: list[int]) -> None:
    """A sum right after it: rank 0 may still be reading when the others go on."""
    size = len(groups)
    sizes = tuple(widths[:size])
    parts = [torch.randn(num_rows, width) for width in sizes]

    def work(rank: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        return groups[rank].gather(parts[rank], sizes), groups[rank].all_reduce(torch.ones(100))

    results = on_all(size, work)
    assert results[0][0] is not None
    assert torch.equal(results[0][0], torch.cat(parts, dim=1))
    assert all(gathered is None for gathered, _ in results[1:])
    assert all((total == size).all() for _, total in results)


def test_one_rank_alone_is_the_identity() -> None:
    x = torch.randn(3, 4)
    assert Alone().all_reduce(x) is x
    assert Alone().gather(x, (4,)) is x
    assert Alone().all_to_all(x, [3]) == (x, [3])


row_shapes = st.sampled_from([(), (3,), (2, 5)])
all_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8])


@pytest.mark.parametrize("groups", [*OF_CPUS, (make_nccl, 2), (make_nccl, 3)], indirect=True)
@given(data=st.data(), dtype=all_dtypes, row_shape=row_shapes, most=st.sampled_from([0, 1, 3, 40]))
@settings(max_examples=30, deadline=None)
def test_all_to_all_brings_rows_to_their_ranks(
    groups: list[TensorGroup], data: st.DataObject, dtype: torch.dtype, row_shape: tuple[int, ...], most: int
) -> None:
    """Zeros and messages of many pieces among them; bit for bit; and a sum right after it."""
    size = len(groups)
    row = st.lists(st.integers(0, most), min_size=size, max_size=size)
    counts = data.draw(st.lists(row, min_size=size, max_size=size))
    inputs = [random_rows(rank, sum(counts[rank]), row_shape, dtype) for rank in range(size)]

    def work(rank: int) -> tuple[tuple[torch.Tensor, list[int]], torch.Tensor]:
        return groups[rank].all_to_all(inputs[rank], counts[rank]), groups[rank].all_reduce(torch.ones(3))

    sections = [x.split(own) for x, own in zip(inputs, counts, strict=True)]
    for rank, ((rows, received), total) in enumerate(on_all(size, work)):
        assert received == [from_peer[rank] for from_peer in counts]
        assert rows.dtype is dtype
        expected = torch.cat([from_peer[rank] for from_peer in sections])
        assert rows.shape == expected.shape
        assert torch.equal(rows.view(torch.uint8), expected.view(torch.uint8))
        assert total.tolist() == [size] * 3


def random_rows(seed: int, count: int, row_shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bits: NaNs too."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes = count * math.prod(row_shape) * dtype.itemsize
    bits = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).view(count, *row_shape)


def test_rows_that_do_not_lie_in_order_are_sent_in_order(groups: list[TensorGroup]) -> None:
    size = len(groups)
    x = torch.arange(4.0 * size).view(4, size).T
    results = on_all(size, lambda rank: groups[rank].all_to_all(x, [1] * size)[0])
    for rank, rows in enumerate(results):
        assert torch.equal(rows, x[rank].expand(size, 4))


def test_nothing_is_summed_without_a_peer(groups: list[TensorGroup]) -> None:
    """The others do not even call it."""
    x = torch.empty(0, 7)
    assert groups[1].all_reduce(x) is x


@given(values=st.lists(st.integers(-(2**40), 2**40), min_size=4, max_size=4))
@settings(max_examples=5, deadline=None)
def test_integers_are_summed_exactly(groups: list[TensorGroup], values: list[int]) -> None:
    size = len(groups)
    totals = on_all(size, lambda rank: groups[rank].all_reduce(torch.tensor([values[rank]])))
    assert [total.item() for total in totals] == [sum(values[:size])] * size


OPERATIONS: dict[str, Callable[[TensorGroup], object]] = {
    "sum": lambda group: group.all_reduce(torch.ones(3)),
    "exchange": lambda group: group.all_to_all(torch.ones(6), [6 // group.size] * group.size),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("make", [make_shared, make_mesh])
def test_a_peer_that_hangs_is_given_up(make: Callable[..., TensorGroup | None], operation: str) -> None:
    board = Board(HashStore(), Wait(20))
    members = on_all(2, lambda rank: make(board, rank, 2, timeout=0.5))
    assert members[0] is not None
    with pytest.raises(TimeoutError):
        OPERATIONS[operation](members[0])
    for member in members:
        assert member is not None
        member.close()


def test_a_peer_that_left_is_noticed() -> None:
    first, second = join_all(make_shared, 2)
    second.close()
    with pytest.raises(ConnectionResetError, match="rank 1 of the group"):
        first.all_reduce(torch.ones(3))
    first.close()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("make", [make_shared, make_mesh])
def test_abort_ends_a_wait_here_and_on_the_peers(make: Make, operation: str) -> None:
    """All wait for rank 0, which does nothing; one of those that wait is told to stop."""
    members = join_all(make, 3)
    timer = threading.Timer(0.05, members[1].abort)

    def work(rank: int) -> None:
        if rank == 0:
            timer.start()
            return
        with pytest.raises(ConnectionError):
            OPERATIONS[operation](members[rank])

    on_all(3, work)
    timer.join()
    with suppress(ConnectionError):  # it is done where the others' parts had come before they were told
        OPERATIONS[operation](members[0])
    with pytest.raises(ConnectionError):
        OPERATIONS[operation](members[0])
    for member in members:
        member.close()


@pytest.mark.parametrize("make", [make_shared, make_mesh])
def test_a_rank_that_is_done_may_leave_before_the_others_are(make: Make) -> None:
    """Rank 2 has given its part and goes; rank 0 still waits for that of rank 1."""
    members = join_all(make, 3)
    left = threading.Event()

    def work(rank: int) -> torch.Tensor | None:
        if rank == 1:
            assert left.wait(10)
            time.sleep(0.1)  # long enough for rank 0 to notice
        whole = members[rank].gather(torch.full((1, 1), float(rank)), (1, 1, 1))
        if rank == 2:
            members[2].close()
            left.set()
        return whole

    whole = on_all(3, work)[0]
    assert whole is not None
    assert whole.tolist() == [[0.0, 1.0, 2.0]]
    for member in members[:2]:
        member.close()


@pytest.mark.parametrize("make", [make_shared, make_mesh])
def test_a_death_is_noticed_by_who_waits_for_another(make: Make) -> None:
    """Rank 1 does nothing, and rank 2 dies without a goodbye."""
    members = join_all(make, 3)
    if isinstance(members[2], Mesh):
        members[2].abort()  # what the system does to a dead process's links
    else:
        members[2].close()
    with pytest.raises(ConnectionError):
        members[0].all_to_all(torch.ones(6), [2] * 3)
    for member in members:
        member.close()


def test_without_shared_memory_all_ranks_agree_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank that cannot open the segment is enough."""
    opened = threading.Semaphore(1)

    def open_once(path: str, nonce: bytes) -> int | None:
        return real_open(path, nonce) if opened.acquire(blocking=False) else None

    real_open = shared_memory._open
    monkeypatch.setattr(shared_memory, "_open", open_once)
    assert join_all(make_shared, 3) == [None, None, None]


def test_a_strangers_file_is_not_taken_for_the_segment(tmp_path: Any) -> None:
    stranger = tmp_path / "file"
    stranger.write_bytes(b"x" * 100)
    assert shared_memory._open(str(stranger), b"y" * 16) is None
    assert shared_memory._open(str(tmp_path / "none"), b"y" * 16) is None


def test_links_carry_tensors_in_order() -> None:
    board = Board(HashStore(), Wait(20)).part("test")
    listener = Listener(board, "to1", "127.0.0.1")
    sender, receiver = connect(board, "to1", 5.0), listener.accept(5.0)
    big = torch.randn(700_000)  # more than the system buffers

    def send() -> None:
        sender.send(torch.arange(6, dtype=torch.bfloat16).view(2, 3).T)
        sender.send(big)

    thread = threading.Thread(target=send)
    thread.start()
    assert receiver.receive(torch.empty(3, 2, dtype=torch.bfloat16)).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert torch.equal(receiver.receive(torch.empty_like(big)), big)
    thread.join()
    sender.close()
    with pytest.raises(ConnectionResetError):
        receiver.receive(torch.empty(1))
    receiver.close()


def test_a_loopback_rendezvous_is_met_on_loopback() -> None:
    assert local_address("127.0.0.1", 1) == "127.0.0.1"
