"""A light tenant's steps stay short beside a heavy one, whose sequences go on nevertheless."""

from __future__ import annotations

from dataclasses import replace

from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.request import GenerateRequest
from qwen_ray.engine.company import Shares, StepTimes
from qwen_ray.engine.sequence import Sequence
from tests.unit.engine.harness import Harness, request

CONFIG = EngineConfig(num_blocks=256, block_size=4, max_model_len=64, max_num_seqs=32, max_num_batched_tokens=64)


def of(tenant: str, name: str, *, prompt: int = 4, max_tokens: int = 8, priority: int = 0) -> GenerateRequest:
    ids = [sum(map(ord, name)) * 100 + i for i in range(prompt)]
    return replace(request(name, ids, max_tokens=max_tokens), tenant=tenant, priority=priority)


def sequences(tenants: str) -> list[Sequence]:
    found = [Sequence(of(name, f"{name}{i}"), number=i, max_len=12, now=0.0) for i, name in enumerate(tenants)]
    for number, seq in enumerate(found):
        seq.sequence_id = number
    return found


def of_all(running: list[Sequence]) -> Shares:
    shares = Shares()
    for seq in running:
        shares.came(seq)
    return shares


def filled(config: EngineConfig = CONFIG, *, max_tokens: int = 40) -> Harness:
    """With a heavy tenant that has more to do than there is room for; steps of all sizes have been seen."""
    harness = Harness(config)
    for count in (1, 2, 4, 8, 16, 32):
        harness.add(
            *(of("", f"warm{count}-{i}", prompt=1, max_tokens=3) for i in range(min(count, config.max_num_seqs)))
        )
        harness.drain()
    harness.add(*(of("heavy", f"heavy{i}", max_tokens=max_tokens) for i in range(3 * config.max_num_seqs)))
    for _ in range(4):
        harness.step()
    return harness


def test_sizes_of_steps_are_found_out() -> None:
    times = StepTimes(1.5)
    assert times.most(1) is None
    asked: list[int] = []
    times.took(64, 64.0)
    for _ in range(12):
        most = times.most(1)
        assert most is not None
        asked.append(most)
        times.took(most, 10.0 + most)
    # By halves to the smallest, and then what takes no longer than it may: 16 of 1, where 11 s may become 16.5.
    assert asked[:6] == [32, 16, 8, 4, 2, 1]
    assert set(asked[6:]) == {4}
    assert 10.0 + 4 <= 1.5 * 11.0 < 10.0 + 8


def test_what_else_runs_on_the_machine_is_no_time_of_a_step() -> None:
    times = StepTimes(1.5)
    for size in (1, 2, 4, 8, 16, 32, 64):
        times.took(size, 1.0 + size / 8)
    before = times.most(1)
    for size in (1, 2, 4, 8, 16, 32, 64):
        times.took(size, 30.0)
    assert times.most(1) == before


def test_where_large_steps_take_as_long_as_small_ones_there_is_no_limit() -> None:
    times = StepTimes(1.5)
    for size in (1, 4, 64):
        times.took(size, 1.0 + size / 1000)
    assert times.most(1) is None
    times.took(3, 0.0)  # of ranks that do not say
    assert times.most(1) is None


def test_who_is_light() -> None:
    running = sequences("aaaaaaab")
    shares = of_all(running)
    one_of_a, *_, b = running
    assert shares.is_light(b)
    assert not shares.is_light(one_of_a)
    assert not of_all(sequences("aaaa")).is_light(sequences("a")[0])
    assert not any(map(of_all(sequences("ab")).is_light, sequences("ab")))
    (coming,) = sequences("c")
    coming.leave_ranks()
    assert shares.is_light(coming)
    less_urgent = Sequence(of("d", "d0", priority=1), number=0, max_len=12, now=0.0)
    assert not shares.is_light(less_urgent)
    shares.left(b)
    assert shares.num_parties == 1
    assert not shares.is_light(one_of_a)


def test_a_light_tenant_waits_for_few_tokens_of_others() -> None:
    harness = filled()
    harness.add(of("light", "light"))
    since = len(harness.steps)
    while "light" in harness.alive:
        harness.step()
    steps = [names for names in harness.steps[since:] if "light" in names]
    tokens = [batch.num_tokens for batch in harness.ranks.batches[-len(steps) :]]
    assert len(steps) == 8
    assert max(tokens) <= 8
    assert all(len(names) > 1 for names in steps)  # others go on
    harness.drain()
    harness.check_ended()


def test_how_much_it_waits_is_for_its_owner_to_say() -> None:
    harness = filled(replace(CONFIG, light_tenant_slowdown=1000.0))
    harness.add(of("light", "light"))
    harness.step()
    assert "light" in harness.steps[-1]
    assert len(harness.steps[-1]) == CONFIG.max_num_seqs


def test_others_take_turns_beside_it() -> None:
    harness = filled()
    harness.add(of("light", "light", max_tokens=40))
    while not harness.output("light"):
        harness.step()
    heavy = [seq for seq in harness.running if seq.request.tenant == "heavy"]
    before = {seq: seq.num_tokens for seq in heavy}
    for _ in range(35):
        harness.step()
    gained = [seq.num_tokens - num for seq, num in before.items() if seq.is_on_ranks]
    assert len(gained) > 20
    assert max(gained) - min(gained) <= 1
    assert min(gained) >= 1


def test_a_light_tenant_gets_a_place_where_a_heavy_one_has_taken_all() -> None:
    harness = filled(replace(CONFIG, max_num_seqs=8))
    assert len(harness.running) == 8
    harness.add(of("light", "light"))
    since = len(harness.steps)
    while "light" in harness.alive:
        harness.step()
    assert all("light" in names for names in harness.steps[since:])
    assert harness.scheduler.stats().preemptions_total == 1
    harness.drain()
    harness.check_ended()


def test_blocks_too_but_no_more_than_its_share() -> None:
    config = replace(CONFIG, num_blocks=64, max_num_seqs=8)
    harness = filled(config, max_tokens=50)
    while harness.scheduler.dp_ranks[0].pool.num_free > 8:
        harness.step()
    num_preemptions = harness.scheduler.stats().preemptions_total
    harness.add(of("greedy", "greedy", prompt=60, max_tokens=2))  # 15 of 64 blocks, where two share
    harness.step()
    assert "greedy" in harness.steps[-1]
    assert harness.scheduler.stats().preemptions_total > num_preemptions
    harness.drain()
    harness.check_ended()
    harness = filled(replace(config, num_blocks=24), max_tokens=50)
    num_preemptions = harness.scheduler.stats().preemptions_total
    harness.add(of("greedy", "greedy", prompt=60, max_tokens=2))
    harness.step()
    assert "greedy" not in harness.steps[-1]
    harness.drain()
    harness.check_ended()


def test_without_another_tenant_steps_are_as_large_as_they_may_be() -> None:
    harness = filled()
    assert len(harness.steps[-1]) == CONFIG.max_num_seqs
    assert harness.scheduler.stats().preemptions_total == 0
