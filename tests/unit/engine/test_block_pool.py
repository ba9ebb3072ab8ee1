"""The block pool's books, under any order of what a scheduler does to it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwen_ray.engine.block_pool import BlockPool, hash_block

NUM_BLOCKS = 8


def chain(*tokens: int) -> list[bytes]:
    """Hashes of blocks of one token each."""
    hashes = [b""]
    for token in tokens:
        hashes.append(hash_block(hashes[-1], [token]))
    return hashes[1:]


def hold(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    """A table whose blocks have these contents, hit as far as they are known."""
    hits = pool.match(hashes)
    pool.share(hits)
    table = hits + pool.allocate(len(hashes) - len(hits))
    for block, content in zip(table, hashes, strict=True):
        pool.register(block, content)
    return table


def test_a_hash_depends_on_all_tokens_before() -> None:
    assert chain(1, 2)[1] != chain(3, 2)[1]
    assert chain(1, 2) == chain(1, 2)
    assert hash_block(b"", [1, 2]) != hash_block(b"", [2, 1])


def test_released_blocks_can_be_hit_until_they_are_evicted() -> None:
    pool = BlockPool(4)
    table = hold(pool, chain(1, 2, 3))
    pool.release(table)
    assert pool.num_free == 4
    assert pool.num_cached_free == 3
    assert pool.match(chain(1, 2, 9)) == table[:2]
    pool.allocate(1)  # the free block goes first
    assert pool.match(chain(1, 2, 3)) == table
    pool.allocate(1)  # then the end of the prefix
    assert pool.match(chain(1, 2, 3)) == table[:2]


def test_the_least_recently_used_content_is_evicted_first() -> None:
    pool = BlockPool(2)
    first, second = hold(pool, chain(1)), hold(pool, chain(2))
    pool.release(first)
    pool.release(second)
    pool.release(hold(pool, chain(1)))  # used again
    pool.allocate(1)
    assert pool.match(chain(1)) == first
    assert pool.match(chain(2)) == []


def test_cost_counts_hits_that_somebody_holds_as_free_of_charge() -> None:
    pool = BlockPool(4)
    hold(pool, chain(1))
    pool.release(hold(pool, chain(2)))
    assert pool.cost(pool.match(chain(1)), 3) == 2
    assert pool.cost(pool.match(chain(2)), 3) == 3


def test_forgotten_content_is_not_hit_and_goes_back_as_worthless() -> None:
    pool = BlockPool(2)
    table = hold(pool, chain(1, 2))
    pool.forget(table)
    assert pool.match(chain(1)) == []
    pool.release(table)
    assert pool.num_cached_free == 0
    pool.check([])


def test_check_finds_a_leak() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check([])


class Books(RuleBasedStateMachine):
    """Tables come and go, sharing prefixes over an alphabet so small that they often meet."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.tables: list[list[int]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def begin(self, tokens: list[int]) -> None:
        hashes = chain(*tokens)
        cost = self.pool.cost(self.pool.match(hashes), len(hashes))
        if cost <= self.pool.num_free:
            before = self.pool.num_free
            self.tables.append(hold(self.pool, hashes))
            assert before - self.pool.num_free == cost

    @precondition(lambda self: self.tables and self.pool.num_free)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        table += self.pool.allocate(1)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), distrusted=st.booleans())
    def end(self, data: st.DataObject, distrusted: bool) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        if distrusted:
            self.pool.forget(table)
        self.pool.release(table)

    @invariant()
    def books_agree(self) -> None:
        self.pool.check(self.tables)

    def teardown(self) -> None:
        for table in self.tables:
            self.pool.release(table)
        assert self.pool.num_free == NUM_BLOCKS


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
