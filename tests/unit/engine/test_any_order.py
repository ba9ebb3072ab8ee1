"""The scheduler under any order of arrivals, steps, aborts, deadlines and deaths, some of them by its own doing."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qwen_ray.core.errors import ContextLengthExceeded, Overloaded
from qwen_ray.core.plan import EngineConfig
from qwen_ray.core.pooling import Pooling
from qwen_ray.core.request import GenerateRequest, SamplingParams
from tests.unit.engine.fake_ranks import LETHAL, LETHAL_LATER, POISON, alone
from tests.unit.engine.harness import Harness


class AnyOrder(RuleBasedStateMachine):
    """Any events in any order, over few blocks and prompts that share their beginnings."""

    @initialize(
        depth=st.integers(1, 3),
        num_blocks=st.integers(3, 12),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 12),
        caching=st.booleans(),
        dp_attention=st.sampled_from([1, 2, 3]),
    )
    def begin(
        self,
        depth: int,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        budget: int,
        caching: bool,
        dp_attention: int,
    ) -> None:
        self.harness = Harness(
            EngineConfig(
                num_blocks=num_blocks,
                block_size=block_size,
                max_model_len=24,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=budget,
                max_num_waiting=6,
                enable_prefix_caching=caching,
                depth=depth,
                dp_attention=dp_attention,
            )
        )

    @rule(
        shared=st.integers(0, 8),
        own=st.lists(st.integers(0, 3), min_size=1, max_size=6),
        earlier=st.sampled_from([0, 0, 0, 2]),
        max_tokens=st.one_of(st.none(), st.integers(3, 20)),
        min_tokens=st.integers(0, 3),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        seed=st.sampled_from([1, 2, 3, 4, 5, POISON, LETHAL, LETHAL_LATER]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        tenant=st.sampled_from(["a", "b", "c"]),
        time_left=st.sampled_from([None, None, None, 0.0, 2.0]),
        is_suspect=st.sampled_from([False, False, False, True]),
        pooling=st.sampled_from([None, None, None, Pooling(), Pooling(token_ids=(3, 1))]),
    )
    def arrive(
        self,
        shared: int,
        own: list[int],
        earlier: int,
        max_tokens: int | None,
        min_tokens: int,
        priority: int,
        seed: int,
        prompt_logprobs: int | None,
        tenant: str,
        time_left: float | None,
        is_suspect: bool,
        pooling: Pooling | None,
    ) -> None:
        new = GenerateRequest(
            request_id=f"r{len(self.harness.requests)}",
            prompt_token_ids=(*range(shared), *own),
            sampling=SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, prompt_logprobs=prompt_logprobs),
            seed=seed,
            stop_token_ids=(0, 1, 2),
            priority=priority,
            tenant=tenant,
            weight=2.0 if tenant == "a" else 1.0,
            deadline=None if time_left is None else self.harness.now + time_left,
            is_suspect=is_suspect,
            pooling=pooling,
        )
        tokens, _ = alone(new, self.harness.config)
        if len(tokens) > earlier > 0:
            new = new.resumed(tuple(tokens[:earlier]))
        try:
            self.harness.add(new)
        except (ContextLengthExceeded, Overloaded):
            assert new.request_id not in self.harness.requests

    @precondition(lambda self: len(self.harness.inflight) < self.harness.config.depth)
    @rule()
    def submit(self) -> None:
        self.harness.submit()

    @precondition(lambda self: self.harness.inflight)
    @rule()
    def finish(self) -> None:
        self.harness.finish()

    @rule(steps=st.integers(1, 6))
    def run_steps(self, steps: int) -> None:
        for _ in range(steps):
            self.harness.step()

    @precondition(lambda self: not self.harness.scheduler.is_idle)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.harness.alive or ["nobody"]))
        self.harness.abort(name)

    @rule()
    def time_passes(self) -> None:
        self.harness.now += 1.0

    @rule(what=st.sampled_from(["nothing", "nothing", "they die", "they are stopped"]))
    def lose_ranks(self, what: str) -> None:
        if what == "they die":
            self.harness.die()
        elif what == "they are stopped":
            self.harness.restart(ranks_died=False)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "harness"):
            self.harness.check_books()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.drain()
            self.harness.check_ended()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
