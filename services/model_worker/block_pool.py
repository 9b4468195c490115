"""Blocks of the KV cache: reference counts, hash-chained prefix cache, eviction. Pure bookkeeping, no tensors.

A block that is full of verified tokens may be registered under the hash of all tokens up to its end. When nobody holds it any more
it stays findable until its memory is wanted.

What goes first: most prompts are seen once, and a long one of them pushes everything else out of a cache that goes by recency
alone. So blocks that were wanted again stand in a queue of their own (as in 2Q, Johnson and Shasha 1994), each queue least
recently used first, and of the two that come next the one goes whose age is greater, where an age in the second queue counts
REUSED_AGE of it. The digests of the blocks evicted last are remembered, so that what comes back counts as wanted again.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

# The same in every process and run: digests of different workers can be compared.
ROOT_HASH = blake2b(b"gorgon prefix cache 1", digest_size=16).digest()


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """128-bit digest of a block that holds `tokens`, after the blocks that `parent` stands for (ROOT_HASH: none)."""
    return blake2b(parent + array("i", tokens).tobytes(), digest_size=16).digest()


# On the synthetic trace of Mooncake, hit rates are flat from 0.03 to 0.25 (benchmarks/prefix_cache.py).
REUSED_AGE = 0.125
REMEMBERED = 2  # digests of evicted blocks, in sizes of the pool


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are free."""


class BlockPool:
    """Hands out the blocks 0 … num_blocks - 1. A block is used (references > 0), cached (registered, no references) or blank."""

    def __init__(self, num_blocks: int, prefix_cache: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"a block pool needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self.prefix_cache = prefix_cache
        self._references = [0] * num_blocks
        self._digest: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))
        # By block, least recently used first: the clock when it came to be unused.
        self._once: OrderedDict[int, int] = OrderedDict()
        self._again: OrderedDict[int, int] = OrderedDict()
        self._reused = [False] * num_blocks
        self._evicted: OrderedDict[bytes, None] = OrderedDict()
        self._clock = 0  # blocks handed out

    @property
    def free(self) -> int:
        """Blocks that `allocate` could hand out, cached ones included."""
        return len(self._blank) + self.cached

    @property
    def cached(self) -> int:
        """Blocks that hold a reusable prefix and belong to nobody."""
        return len(self._once) + len(self._again)

    def allocate(self, count: int) -> list[int]:
        """Blocks with undefined contents, one reference each. Raises OutOfBlocks, then nothing has changed."""
        if count > self.free:
            raise OutOfBlocks(f"{count} blocks wanted, {self.free} free")
        blocks = []
        for _ in range(count):
            block = self._blank.pop() if self._blank else self._evict()
            self._references[block] = 1
            blocks.append(block)
        self._clock += count
        return blocks

    def _evict(self) -> int:
        if self._once and self._again:
            once, again = next(iter(self._once.values())), next(iter(self._again.values()))
            queue = self._once if self._clock - once >= REUSED_AGE * (self._clock - again) else self._again
        else:
            queue = self._once or self._again
        block, _ = queue.popitem(last=False)
        digest = self._digest[block]
        assert digest is not None
        del self._by_digest[digest]
        self._digest[block] = None
        self._reused[block] = False
        self._evicted[digest] = None
        if len(self._evicted) > REMEMBERED * self.num_blocks:
            self._evicted.popitem(last=False)
        return block

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """The registered blocks of the longest prefix of `digests`, with a reference taken on each."""
        blocks = []
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None:
                break
            if self._references[block] == 0:
                del (self._again if self._reused[block] else self._once)[block]
            self._reused[block] = True
            self._references[block] += 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> list[int]:
        """Another reference on each of some used blocks; those that are -1 (released) stay so."""
        shared = list(blocks)
        for block in shared:
            if block >= 0:
                if self._references[block] == 0:
                    raise ValueError(f"block {block} is not in use")
                self._references[block] += 1
        return shared

    def register(self, block: int, digest: bytes) -> None:
        """Makes a used block findable. The first block registered under a digest stays the one that is found."""
        if self._references[block] == 0:
            raise ValueError(f"block {block} is not in use")
        if self.prefix_cache and self._digest[block] is None and digest not in self._by_digest:
            self._digest[block] = digest
            self._by_digest[digest] = block
            if digest in self._evicted:
                del self._evicted[digest]
                self._reused[block] = True

    def release(self, blocks: Iterable[int]) -> None:
        """Drops one reference of each. Pass a sequence's last blocks first: what comes first is evicted first, and a prefix is of
        no use without its beginning."""
        for block in blocks:
            references = self._references[block]
            if references == 0:
                raise ValueError(f"block {block} is released but not in use")
            self._references[block] = references - 1
            if references == 1:
                if self._digest[block] is None:
                    self._blank.append(block)
                else:
                    (self._again if self._reused[block] else self._once)[block] = self._clock

    def check(self) -> list[str]:
        """Complaints about the pool's own consistency; empty if all is well."""
        used = {block for block in range(self.num_blocks) if self._references[block] > 0}
        blank, cached = set(self._blank), {*self._once, *self._again}
        complaints = []
        if any(self._reused[block] for block in blank | set(self._once)) or not all(
            map(self._reused.__getitem__, self._again)
        ):
            complaints.append("a block stands in the wrong queue")
        if len(blank) != len(self._blank):
            complaints.append("a block is blank twice")
        if (
            used | blank | cached != set(range(self.num_blocks))
            or len(used) + len(blank) + len(cached) != self.num_blocks
        ):
            complaints.append("a block is in no state, or in two")
        if any(self._digest[block] is None for block in cached) or any(
            self._digest[block] is not None for block in blank
        ):
            complaints.append("a cached block has no digest, or a blank one has")
        if {digest: block for block, digest in enumerate(self._digest) if digest is not None} != self._by_digest:
            complaints.append("the digests and their index disagree")
        return complaints
