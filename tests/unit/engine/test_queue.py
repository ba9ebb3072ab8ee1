"""Who is next: priorities, tenants, turns; and how many may wait."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen_ray.core.errors import InvalidRequest, Overloaded
from qwen_ray.core.plan import EngineConfig
from qwen_ray.engine.queue import MAX_RETRY_AFTER, Pace, Queue
from qwen_ray.engine.sequence import Sequence
from qwen_ray.engine.sequence_heap import SequenceHeap
from tests.unit.engine.harness import Harness, request


def waiting(
    name: str, tenant: str = "", *, arrival: float = 1.0, priority: int = 0, weight: float = 1.0, output: int = 0
) -> Sequence:
    one = replace(request(name, [1]), tenant=tenant, arrival=arrival, priority=priority, weight=weight)
    one = one.resumed(tuple(range(output)))
    return Sequence(one, number=int(arrival), max_len=10, now=arrival)


def queue_of(*sequences: Sequence, limit: int = 100) -> Queue:
    queue = Queue(limit)
    for seq in sequences:
        queue.know(seq)
        queue.push(seq)
    return queue


def take(queue: Queue, *, cost: float = 0.0) -> str:
    seq = queue.first()
    assert seq is not None
    queue.remove(seq)
    queue.charge(seq, cost)
    return seq.request.request_id


def take_all(queue: Queue, *, cost: float = 0.0) -> list[str]:
    return [take(queue, cost=cost) for _ in range(len(queue))]


def test_a_tenant_alone_is_served_by_arrival() -> None:
    queue = queue_of(*(waiting(f"r{i}", arrival=float(i)) for i in (3, 1, 2)))
    assert take_all(queue, cost=10.0) == ["r1", "r2", "r3"]
    assert queue.first() is None


def test_priorities_come_before_tenants() -> None:
    queue = queue_of(waiting("a", "x"), waiting("b", "y", priority=1), waiting("c", "x", priority=-1, arrival=2.0))
    assert take_all(queue, cost=1000.0) == ["c", "a", "b"]


def test_two_tenants_take_turns_though_one_came_first_with_everything() -> None:
    many = [waiting(f"a{i}", "a", arrival=float(i)) for i in range(4)]
    few = [waiting(f"b{i}", "b", arrival=10.0 + i) for i in range(2)]
    assert take_all(queue_of(*many, *few), cost=5.0) == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_a_tenant_of_twice_the_weight_is_served_twice_as_often() -> None:
    many = [waiting(f"a{i}", "a", weight=2.0, arrival=float(i)) for i in range(6)]
    few = [waiting(f"b{i}", "b", arrival=float(i)) for i in range(3)]
    order = "".join(name[0] for name in take_all(queue_of(*many, *few), cost=4.0))
    assert order == "abaabaaba"


def test_what_is_served_while_it_runs_counts() -> None:
    long, short = waiting("a0", "a"), waiting("b0", "b", arrival=2.0)
    queue = queue_of(long, short, waiting("a1", "a", arrival=3.0), waiting("b1", "b", arrival=4.0))
    assert [take(queue), take(queue)] == ["a0", "a1"]  # nothing has been charged yet
    queue.charge(long, 5.0)
    queue.push(waiting("a2", "a", arrival=5.0))
    assert take_all(queue) == ["b0", "b1", "a2"]


def test_nobody_saves_up_by_being_idle() -> None:
    busy = [waiting(f"a{i}", "a", arrival=float(i)) for i in range(12)]
    queue = queue_of(*busy)
    assert [take(queue, cost=100.0) for _ in range(6)] == [f"a{i}" for i in range(6)]
    for i in range(4):
        late = waiting(f"b{i}", "b", arrival=50.0 + i)
        queue.know(late)
        queue.push(late)
    assert take_all(queue, cost=100.0) == ["b0", "a6", "a7", "b1", "a8", "b2", "a9", "b3", "a10", "a11"]


def test_nobody_saves_up_while_the_queue_is_empty_either() -> None:
    running, first, second = waiting("a0", "a"), waiting("b0", "b"), waiting("a1", "a")
    queue = queue_of(running)
    take(queue, cost=1000.0)
    for seq in (first, second):
        queue.know(seq)
        queue.push(seq)
    queue.charge(first, 1.0)
    assert take_all(queue) == ["a1", "b0"]


def test_nobody_is_rid_of_what_it_was_served_by_asking_one_at_a_time() -> None:
    queue = queue_of(waiting("a0", "a"), waiting("b0", "b", arrival=2.0), waiting("b1", "b", arrival=3.0))
    assert take(queue, cost=100.0) == "a0"
    again = waiting("a1", "a", arrival=4.0)
    queue.know(again)
    queue.push(again)
    assert take_all(queue, cost=40.0) == ["b0", "b1", "a1"]


def test_those_who_have_begun_come_first_and_by_turn() -> None:
    begun = [waiting("late", "a", arrival=9.0, output=1), waiting("early", "a", arrival=8.0, output=1)]
    queue = queue_of(waiting("new", "b"), *begun, waiting("urgent", priority=-1))
    queue.charge(begun[0], 1e6)
    assert take_all(queue) == ["urgent", "early", "late", "new"]


def test_any_of_them_may_leave() -> None:
    sequences = [waiting(f"r{i}", "ab"[i % 2], arrival=float(i), output=i % 3 == 0) for i in range(60)]
    queue = queue_of(*sequences)
    assert queue.num_tokens == 60 + 20
    for seq in sequences[1::2]:
        queue.remove(seq)
    assert queue.num_tokens == 30 + 10
    assert set(take_all(queue)) == {f"r{i}" for i in range(0, 60, 2)}
    assert (len(queue), queue.num_tokens) == (0, 0)


def test_accounts_end_with_the_last_of_their_priority() -> None:
    first, second = waiting("a", "x"), waiting("b", "y", priority=1)
    queue = queue_of(first, second)
    take_all(queue)
    queue.forget(first)
    assert list(queue._by_priority) == queue._priorities == [1]
    queue.forget(second)
    assert list(queue._by_priority) == queue._priorities == []


def test_a_heap_keeps_few_entries_of_those_who_left() -> None:
    heap, sequences = SequenceHeap(), [waiting(f"r{i}") for i in range(1000)]
    for i, seq in enumerate(sequences):
        heap.push((i,), seq)
    for seq in sequences[:-1]:
        heap.discard(seq)
    assert len(heap._entries) < 20
    assert (len(heap), heap.first()) == (1, sequences[-1])


def test_one_that_comes_back_into_a_heap_goes_by_its_new_key() -> None:
    heap, (first, second) = SequenceHeap(), (waiting("a"), waiting("b"))
    heap.push((1,), first)
    heap.push((5,), second)
    heap.discard(first)
    heap.push((5,), first)
    assert heap.first() is second
    heap.discard(second)
    assert heap.first() is first


def test_one_tenant_may_fill_the_queue_but_not_for_the_others() -> None:
    queue = Queue(6)

    def push_all(tenant: str) -> int:
        for i in range(100):
            try:
                queue.check_room(tenant)
            except Overloaded:
                return i
            seq = waiting(f"{tenant}{i}", tenant)
            queue.know(seq)
            queue.push(seq)
        raise AssertionError("it never ends")

    assert [push_all(tenant) for tenant in "abcde"] == [6, 3, 2, 1, 0]  # and twice the limit is the end
    assert push_all("b") == 0
    assert len(queue) == 12
    for _ in range(12):
        take(queue, cost=1.0)
    assert push_all("z") == 6
    assert queue.num_refused == 7


def test_those_who_have_begun_are_always_taken_and_take_nobodys_place() -> None:
    harness = Harness(EngineConfig(num_blocks=8, block_size=4, max_num_waiting=2))
    harness.add(*(request(f"old{i}", [1]).resumed((5,)) for i in range(5)), request("a", [2]), request("b", [3]))
    with pytest.raises(Overloaded, match="7 requests are waiting"):
        harness.scheduler.add(request("c", [4]))
    harness.add(replace(request("suspect", [4]), is_suspect=True), request("old", [1]).resumed((5,)))
    assert harness.scheduler.stats().refused_total == 1
    harness.drain()
    harness.check_ended()


def test_the_wait_is_estimated_from_requests_that_ran_while_there_was_work() -> None:
    queue = queue_of(*(waiting(f"r{i}") for i in range(9)), limit=9)

    def retry_after() -> float:
        with pytest.raises(Overloaded) as refused:
            queue.check_room("")
        return refused.value.retry_after

    assert retry_after() == 1.0  # nothing is known yet
    queue.pace.begin(100.0)
    for now in (102.0, 104.0):
        queue.pace.end(now)
    assert retry_after() == pytest.approx(20.0)
    queue.pace.begin(9000.0)  # after hours without work
    queue.pace.end(9002.0)
    assert retry_after() == pytest.approx(20.0)
    queue.pace.end(10000.0)
    assert retry_after() == MAX_RETRY_AFTER


def test_neither_idle_hours_nor_who_gave_up_waiting_count() -> None:
    harness = Harness(EngineConfig(num_blocks=8, max_num_seqs=1, max_num_waiting=4))
    for start in (2000.0, 9000.0):
        harness.now = start
        harness.add(request(f"a{start}", [1], max_tokens=1), request(f"b{start}", [2], max_tokens=1))
        for _ in range(2):
            harness.now += 3.0
            harness.step()
    harness.add(*(request(f"r{i}", [3]) for i in range(4)))
    for i in range(4):
        harness.abort(f"r{i}")
    harness.add(*(request(f"s{i}", [3]) for i in range(4)))
    with pytest.raises(Overloaded) as refused:
        harness.add(request("one more", [3]))
    assert refused.value.retry_after == pytest.approx(3.0 * 5)


def test_pace_follows_the_last_ones() -> None:
    pace = Pace()
    for now in range(100):
        pace.end(float(now))
    for now in range(1000, 1000 + 10 * 64, 10):
        pace.end(float(now))
    assert pace.seconds_each == pytest.approx((901 + 63 * 10) / 64)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_must_be_above_0(weight: float) -> None:
    with pytest.raises(InvalidRequest, match="weight"):
        Harness(EngineConfig(num_blocks=8)).add(replace(request("a", [1]), weight=weight))
