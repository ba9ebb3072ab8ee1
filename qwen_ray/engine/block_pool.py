"""Who holds which block of KV memory, and which blocks' content may be hit again.

Blocks are numbers here: neither tensors, nor sequences, nor ranks are known. A block is in exactly one of three states:

    used         in at least one block table; `refs` counts them
    cached free  in none, but its content is known by hash: a hit takes it back, an allocation may evict it
    free         in none, content worthless

A content hash names a block's tokens and all tokens before them. Only full blocks have one, so shared ones are never
written to. Everything is O(1) per block.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import blake2b

HASH_BYTES = 16  # finding another prompt with a given hash takes 2^128 tries: no user is served another's blocks


def hash_block(parent: bytes, token_ids: list[int]) -> bytes:
    """The content hash of one full block; `parent` is that of the block before it, b"" for the first."""
    return blake2b(parent + array("i", token_ids).tobytes(), digest_size=HASH_BYTES).digest()


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.clear()

    def clear(self) -> None:
        """Forget all content and all holders."""
        self._refs = [0] * self.num_blocks
        self._hashes: list[bytes | None] = [None] * self.num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free = list(reversed(range(self.num_blocks)))
        self._cached_free: dict[int, None] = {}  # a dict keeps its order: the least recently used block is first

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached ones included."""
        return len(self._free) + len(self._cached_free)

    @property
    def num_cached_free(self) -> int:
        return len(self._cached_free)

    def allocate(self, count: int) -> list[int]:
        """`count <= num_free` blocks of worthless content, held once."""
        blocks: list[int] = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks holding the longest known prefix of `hashes`; not yet held for the caller."""
        blocks: list[int] = []
        for content in hashes:
            block = self._by_hash.get(content)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def cost(self, hits: list[int], num_blocks: int) -> int:
        """By how much a table of `num_blocks`, beginning with `hits`, would lower `num_free`."""
        return num_blocks - sum(1 for block in hits if self._refs[block])

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks that `match` found once more."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._cached_free[block]
            self._refs[block] += 1

    def register(self, block: int, content: bytes) -> None:
        """Let a held, full block be hit. Of two blocks with the same content the first is kept."""
        if content not in self._by_hash:
            self._by_hash[content] = block
            self._hashes[block] = content

    def release(self, blocks: list[int]) -> None:
        """Give up one hold of each. The end of a prefix is evicted before its beginning, which more can share."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._hashes[block] is None:
                    self._free.append(block)
                else:
                    self._cached_free[block] = None

    def forget(self, blocks: Iterable[int]) -> None:
        """Let nobody hit these held blocks any more: their content is not to be trusted."""
        for block in blocks:
            content = self._hashes[block]
            if content is not None:
                del self._by_hash[content]
                self._hashes[block] = None

    def check(self, tables: Iterable[list[int]]) -> None:
        """Raise AssertionError unless the books agree with `tables`, all block tables there are. For tests."""
        refs = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), f"a block twice in one table: {table}"
            for block in table:
                refs[block] += 1
        assert refs == self._refs, f"reference counts {self._refs}, tables hold {refs}"
        unused = {block for block, count in enumerate(refs) if count == 0}
        free, cached = set(self._free), set(self._cached_free)
        assert len(free) == len(self._free), "a block twice in the free list"
        assert not free & cached, f"both free and cached: {free & cached}"
        assert free | cached == unused, f"leaked or doubly owned: {(free | cached) ^ unused}"
        hashed = {block for block, content in enumerate(self._hashes) if content is not None}
        assert hashed == set(self._by_hash.values()), "hashes and blocks disagree"
        assert all(self._hashes[block] == content for content, block in self._by_hash.items()), "wrong hash"
        assert cached <= hashed, f"cached without a hash: {cached - hashed}"
        assert not free & hashed, f"free with a hash: {free & hashed}"

    def _evict(self) -> int:
        block = next(iter(self._cached_free))
        del self._cached_free[block]
        self.forget((block,))
        return block
