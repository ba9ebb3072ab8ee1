"""What tenants are served while they have work waiting, whatever their requests are like."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.request import GenerateRequest
from qwen_ray.engine.queue import OUTPUT_COST, PROMPT_COST
from tests.unit.engine.harness import Harness, request

CONFIG = EngineConfig(num_blocks=64, block_size=4, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=16)


class Tenants:
    """Each always has more requests waiting than could come at once, all of a kind: prompt and output tokens."""

    def __init__(self, config: EngineConfig, kinds: list[tuple[int, int]], weights: list[float], seed: int) -> None:
        self.harness = Harness(config)
        self.kinds = dict(enumerate(kinds))
        self.weights = weights
        self._chance = random.Random(seed)
        self._waiting: dict[int, set[str]] = defaultdict(set)

    def step(self) -> None:
        for tenant, waiting in ((tenant, self._waiting[tenant]) for tenant in self.kinds):
            while len(waiting) <= self.harness.config.max_num_seqs * self.harness.config.depth:
                one = self._request(tenant)
                self.harness.add(one)
                waiting.add(one.request_id)
        before = len(self.harness.steps)
        self.harness.step()
        for waiting in self._waiting.values():
            waiting.difference_update(*self.harness.steps[before:])

    def served(self) -> list[float]:
        """By tenant, per weight. A prompt counts when it is admitted."""
        served: dict[str, float] = defaultdict(float)
        for name, one in self.harness.requests.items():
            if not any(name in waiting for waiting in self._waiting.values()):
                cost = PROMPT_COST * len(one.prompt_token_ids) + OUTPUT_COST * len(self.harness.output(name))
                served[one.tenant] += cost / one.weight
        return [served[str(tenant)] for tenant in self.kinds]

    def most(self) -> float:
        """What the ranks hold at once."""
        longest = max(PROMPT_COST * prompt + OUTPUT_COST * output for prompt, output in self.kinds.values())
        return self.harness.config.max_num_seqs * longest / min(self.weights)

    def _request(self, tenant: int) -> GenerateRequest:
        prompt, output = self.kinds[tenant]
        number = len(self.harness.requests)
        ids = [self._chance.randrange(10**6) for _ in range(prompt)]
        one = request(f"r{number}", ids, max_tokens=output, seed=number)
        return replace(one, tenant=str(tenant), weight=self.weights[tenant])


kinds = st.tuples(st.integers(1, 20), st.integers(1, 12))


@settings(max_examples=15, deadline=None)
@given(
    kinds=st.lists(kinds, min_size=2, max_size=3),
    weights=st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=3, max_size=3),
    depth=st.sampled_from([1, 2]),
    seed=st.integers(0, 9),
)
def test_tenants_with_work_waiting_are_served_alike_by_weight(
    kinds: list[tuple[int, int]], weights: list[float], depth: int, seed: int
) -> None:
    """Theorem 4.4 of Sheng et al. bounds the difference by twice what is held at once, at any time."""
    tenants = Tenants(replace(CONFIG, depth=depth), kinds, weights[: len(kinds)], seed)
    for _ in range(5):
        for _ in range(20):
            tenants.step()
        served = tenants.served()
        assert max(served) - min(served) <= 2 * tenants.most()


def test_they_would_not_be_without_accounts() -> None:
    tenants = Tenants(CONFIG, [(20, 12), (1, 1)], [1.0, 1.0], seed=0)
    tenants.harness.scheduler._queue.charge = lambda seq, cost: None  # pyright: ignore[reportAttributeAccessIssue]
    for _ in range(100):
        tenants.step()
    served = tenants.served()
    assert max(served) - min(served) > 2 * tenants.most()


@pytest.mark.parametrize("num_before", [10, 200])
def test_a_light_tenant_waits_no_longer_behind_a_long_queue(num_before: int) -> None:
    harness = Harness(replace(CONFIG, max_num_waiting=1000))
    harness.add(*(replace(request(f"r{i}", [i], max_tokens=4), tenant="heavy") for i in range(num_before)))
    for _ in range(6):
        harness.step()
    before = len(harness.steps)
    harness.add(replace(request("light", [1, 2]), tenant="light"))
    while not harness.output("light"):
        harness.step()
    assert len(harness.steps) - before <= 5
