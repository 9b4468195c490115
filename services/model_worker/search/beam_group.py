"""The beams of one request in the paged cache: whose slots and blocks they have, and how a step re-points them. Pure bookkeeping.

Beams share all blocks that are full: a block is written by one beam only as long as it is its last. A beam that goes on twice keeps its
last block for the first of the two and has it copied for the second (copy on write). The batch scheduler sees the whole group as
one sequence, which is planned again only after its last step has retired: who goes on is known only then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.model_worker.block_pool import BlockPool
from services.model_worker.interface import EngineRequest, FinishReason, TokenOutput
from services.model_worker.search.beam import BeamSearch, Candidates, Step


@dataclass(slots=True)
class Beam:
    """slot: its row of the device's block tables; blocks: its part of the cache (-1: released, before the attention window);
    token: its newest, not in the cache yet."""

    slot: int
    blocks: list[int]
    token: int


@dataclass(slots=True)
class TableDiff:
    """What a step must do to the device's memory before it computes.

    entries  (slot, column, block) of block tables
    copies   (block, new block, rows): the beginning of a block
    """

    entries: list[tuple[int, int, int]] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)


class BeamGroup:
    """It gets its slots when its request is admitted (`admit`), and its first beam when the prompt has been computed (`begin`)."""

    def __init__(self, request: EngineRequest, stops: dict[int, FinishReason], max_tokens: int) -> None:
        params = request.params
        self.request = request
        self.width = params.num_beams
        self._stops = stops
        self._max_tokens = max_tokens
        self.beams: list[Beam] = []
        self.search = self._new_search()
        self.steps = 0  # also those of earlier attempts
        self._slots: list[int] = []
        self._spare: list[int] = []  # those of no beam
        self._next: Step | None = None
        self._on_device: dict[int, list[int]] = {}  # block tables by slot

    def _new_search(self) -> BeamSearch:
        params = self.request.params
        return BeamSearch(params.num_beams, self._max_tokens, self._stops, params.length_penalty, params.early_stopping)

    def admit(self, slots: list[int]) -> None:
        """slots: `width` of them. The first is the sequence's own while its prompt is computed."""
        self._slots = slots

    def begin(self, blocks: list[int], token: int) -> None:
        """The prompt but for its last token is in `blocks`, which the device knows as those of the first slot."""
        first, *self._spare = self._slots
        self.beams = [Beam(first, blocks, token)]
        self._on_device = {first: list(blocks)} | {slot: [] for slot in self._spare}

    def advance(self, candidates: Candidates) -> None:
        """What came out of a step; takes effect with the next `fork`."""
        self.steps += 1
        self._next = self.search.advance(candidates)

    def outputs(self) -> list[TokenOutput]:
        """What was found, once the search is done: one for each choice."""
        request = self.request
        return [
            TokenOutput(
                request.request_id, choice, request.epoch, 0, found.ids, finish=found.finish, score=found.score,
                stop_token=None if found.finish is FinishReason.LENGTH else found.ids[-1],
            )
            for choice, found in enumerate(self.search.best(request.choices))
        ]  # fmt: skip

    @property
    def rows(self) -> int:
        """Beams in the next step (in the step just planned, after `fork`)."""
        return len(self._next.parents) if self._next is not None else max(1, len(self.beams))

    def missing(self, context: int, block_size: int) -> int:
        """At most so many new blocks are wanted by `fork`. context: tokens of each beam in the cache, without the next row."""
        parents = self._next.parents if self._next is not None else list(range(len(self.beams)))
        copies = len(parents) - len(set(parents)) if context % block_size else 0
        return copies + len(parents) * max(0, context // block_size + 1 - len(self.beams[0].blocks))

    def fork(self, pool: BlockPool, context: int, block_size: int) -> TableDiff:
        """Brings the beams that go on into being, each with room for one more row. The pool has `missing` blocks free."""
        diff = TableDiff()
        if self._next is not None:
            self._refork(pool, self._next, context // block_size, context % block_size, diff)
            self._next = None
        for beam in self.beams:
            if context // block_size == len(beam.blocks):
                beam.blocks += pool.allocate(1)
            known = self._on_device[beam.slot]
            for column, block in enumerate(beam.blocks):
                if block >= 0 and (column >= len(known) or known[column] != block):
                    diff.entries.append((beam.slot, column, block))
            self._on_device[beam.slot] = list(beam.blocks)
        return diff

    def _refork(self, pool: BlockPool, step: Step, full: int, partial: int, diff: TableDiff) -> None:
        old, parents = self.beams, step.parents
        heirs: dict[int, int] = {}  # by parent: its first child, who takes its slot and blocks over
        for child, parent in enumerate(parents):
            heirs.setdefault(parent, child)
        dropped = [beam for index, beam in enumerate(old) if index not in heirs]
        self._spare += [beam.slot for beam in dropped]
        self.beams = []
        for child, (parent, token) in enumerate(zip(parents, step.tokens, strict=True)):
            beam = old[parent]
            if heirs[parent] == child:
                self.beams.append(Beam(beam.slot, beam.blocks, token))
                continue
            blocks = pool.share(beam.blocks[:full])
            if partial:
                blocks += pool.allocate(1)
                diff.copies.append((beam.blocks[full], blocks[full], partial))
            self.beams.append(Beam(self._spare.pop(), blocks, token))
        for beam in dropped:
            _release(pool, beam)

    def release_before(self, pool: BlockPool, first: int, end: int) -> None:
        """Lets go of the columns first … end - 1, which lie before the attention window."""
        for beam in self.beams:
            pool.release(block for block in reversed(beam.blocks[first:end]) if block >= 0)
            beam.blocks[first:end] = [-1] * (end - first)

    def release(self, pool: BlockPool) -> list[int]:
        """Gives everything back, and the search begins anew if it is admitted again. Returns its slots."""
        for beam in self.beams:
            _release(pool, beam)
        slots = self._slots
        self.beams, self._slots, self._spare, self._next, self._on_device = [], [], [], None, {}
        if not self.search.done:
            self.search = self._new_search()
        return slots


def _release(pool: BlockPool, beam: Beam) -> None:
    pool.release(block for block in reversed(beam.blocks) if block >= 0)
    beam.blocks = []


def blocks_needed(prompt: int, limit: int, num_beams: int, block_size: int) -> int:
    """Blocks with which a group always comes to its end: the prompt's full blocks are shared, all else perhaps not; and while beams
    are copied the old ones are still there."""
    shared = prompt // block_size
    return shared + num_beams * (-(-limit // block_size) - shared + 1)
