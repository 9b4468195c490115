"""The block pool against a plain model of it, under any sequence of operations."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.model_worker.block_pool import REMEMBERED, REUSED_AGE, ROOT_HASH, BlockPool, OutOfBlocks, block_hash

BLOCKS = 6
DIGESTS = [block_hash(ROOT_HASH, [number]) for number in range(5)]


class PoolMachine(RuleBasedStateMachine):
    """Model: references by block, digest by block, which were wanted again, and when cached blocks became unused."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.held: list[int] = []  # one entry for each reference
        self.digest: dict[int, bytes] = {}
        self.unused: dict[int, int] = {}  # cached, oldest first: blocks handed out until then
        self.reused: set[int] = set()
        self.evicted: list[bytes] = []
        self.handed_out = 0

    def _drop(self, block: int) -> None:
        self.held.remove(block)
        if block not in self.held and block in self.digest:
            self.unused[block] = self.handed_out

    def _evict(self) -> int:
        def age(block: int) -> float:
            return (self.handed_out - self.unused[block]) * (REUSED_AGE if block in self.reused else 1)

        oldest = {block in self.reused: block for block in reversed(self.unused)}
        block = max(sorted(oldest.values(), key=lambda block: block in self.reused), key=age)
        del self.unused[block]
        self.reused.discard(block)
        self.evicted = [*self.evicted, self.digest.pop(block)][-REMEMBERED * BLOCKS :]
        return block

    @rule(count=st.integers(0, BLOCKS + 1))
    def allocate(self, count: int) -> None:
        free = BLOCKS - len(set(self.held))
        if count > free:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count)
            return
        blank = free - len(self.unused)
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count and not set(blocks) & set(self.held)
        evicted = [self._evict() for _ in range(max(0, count - blank))]
        assert set(evicted) <= set(blocks), "cached blocks go before their turn"
        assert not set(blocks) & set(self.unused)
        self.handed_out += count
        self.held += blocks

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.pool.release([block])
        self._drop(block)

    @rule(block=st.integers(0, BLOCKS - 1))
    def release_what_is_not_held(self, block: int) -> None:
        if block not in self.held:
            with pytest.raises(ValueError):
                self.pool.release([block])

    @precondition(lambda self: self.held)
    @rule(data=st.data(), digest=st.sampled_from(DIGESTS))
    def register(self, data: st.DataObject, digest: bytes) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.pool.register(block, digest)
        if block not in self.digest and digest not in self.digest.values():
            self.digest[block] = digest
            if digest in self.evicted:
                self.evicted.remove(digest)
                self.reused.add(block)

    @rule(digests=st.lists(st.sampled_from(DIGESTS), max_size=3, unique=True))
    def match(self, digests: list[bytes]) -> None:
        index = {digest: block for block, digest in self.digest.items()}
        expected = []
        for digest in digests:
            if digest not in index:
                break
            expected.append(index[digest])
        assert self.pool.match(digests) == expected
        self.held += expected
        self.unused = {block: since for block, since in self.unused.items() if block not in expected}
        self.reused |= set(expected)

    @invariant()
    def consistent(self) -> None:
        assert self.pool.check() == []
        assert self.pool.free == BLOCKS - len(set(self.held))
        assert self.pool.cached == len(self.unused)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_hash_stands_for_all_tokens_before() -> None:
    first = block_hash(ROOT_HASH, [1, 2])
    assert block_hash(first, [3, 4]) == block_hash(block_hash(ROOT_HASH, [1, 2]), [3, 4])
    assert block_hash(first, [3, 4]) != block_hash(ROOT_HASH, [3, 4])
    # Fixed for ever: workers of different processes and versions compare them.
    assert first.hex() == "83d594e1aea4359c7b52bba9babe26a8"


def test_without_a_prefix_cache_nothing_is_found() -> None:
    pool = BlockPool(2, prefix_cache=False)
    (block,) = pool.allocate(1)
    pool.register(block, DIGESTS[0])
    assert pool.match([DIGESTS[0]]) == []
    pool.release([block])
    assert pool.cached == 0 and pool.check() == []


def test_a_prefix_outlives_its_tail() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block, digest in zip(blocks, DIGESTS, strict=False):
        pool.register(block, digest)
    pool.release(reversed(blocks))
    pool.allocate(1)
    assert pool.match(DIGESTS[:3]) == blocks[:2]


def test_what_was_wanted_again_outlives_a_flood_of_what_is_seen_once() -> None:
    pool = BlockPool(64)

    def serve(prompt: range) -> int:
        """One request alone: how many blocks of its prompt were found."""
        digests = [block_hash(ROOT_HASH, [number]) for number in prompt]
        found = pool.match(digests)
        blocks = found + pool.allocate(len(digests) - len(found))
        for block, digest in zip(blocks, digests, strict=True):
            pool.register(block, digest)
        pool.release(reversed(blocks))
        return len(found)

    assert serve(range(3)) == 0 and serve(range(3)) == 3
    for start in range(10, 310, 5):
        assert serve(range(start, start + 5)) == 0
    assert serve(range(3)) == 3
    # But not for ever: eight times as long as a block of the other queue.
    for start in range(1000, 1600, 5):
        serve(range(start, start + 5))
    assert serve(range(3)) == 0
    assert pool.check() == []


def test_what_comes_back_after_its_eviction_was_wanted_again() -> None:
    pool = BlockPool(8)

    def serve(number: int) -> bool:
        digest = block_hash(ROOT_HASH, [number])
        found = pool.match([digest])
        blocks = found or pool.allocate(1)
        pool.register(blocks[0], digest)
        pool.release(blocks)
        return bool(found)

    assert not any(serve(number) for number in range(10))
    assert not serve(0), "evicted"
    assert not any(serve(number) for number in range(20, 32))
    assert serve(0), "not evicted again by twelve that are new"


def test_check_complains() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    pool._references[0] = pool._references[1] = 0
    assert pool.check()


def test_shared_blocks_come_back_with_the_last_reference():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    assert pool.share([-1, *blocks]) == [-1, *blocks]
    pool.release(blocks)
    assert pool.free == 2
    pool.release(blocks)
    assert pool.free == 4 and pool.check() == []
    with pytest.raises(ValueError, match="not in use"):
        pool.share(blocks)
