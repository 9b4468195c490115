"""What the batch scheduler and those who carry its steps out have in common. Pure: no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.model_worker.interface import EngineRequest
from services.model_worker.search.beam_group import TableDiff
from services.model_worker.search.strategy import Strategy
from services.model_worker.sequence import Sequence
from services.model_worker.speculation.tree import Tree


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """max_model_len    longest sequence, prompt and generated tokens together
    max_seqs            slots: sequences that run at the same time
    max_batched_tokens  rows of one step, at least max_seqs
    window              positions that any layer can see, 0: all. Blocks wholly before it are released
    overshoot           positions past max_model_len that a speculation tree may be laid out over
    memories            sequences of contrastive search at a time: each keeps its hidden states
    """

    block_size: int
    max_model_len: int
    max_seqs: int
    max_batched_tokens: int
    eos_ids: frozenset[int] = frozenset()
    window: int = 0
    overshoot: int = 0
    memories: int = 0

    def __post_init__(self) -> None:
        if self.max_batched_tokens < self.max_seqs:
            raise ValueError(f"max_batched_tokens ({self.max_batched_tokens}) is below max_seqs ({self.max_seqs})")

    def blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.block_size)


@dataclass(slots=True)
class Chunk:
    """Rows start … start + rows - 1 of a sequence whose token ids are all known.

    final      the next token is sampled from the last row
    reported   the first and the end of the prompt's tokens whose log-probabilities are wanted; token t's is that of row t - 1
    """

    sequence: Sequence
    start: int
    rows: int
    final: bool
    reported: tuple[int, int] = (0, 0)

    @property
    def report_rows(self) -> range:
        """The rows, counted in the sequence, that the reported tokens' log-probabilities come from: the first token has none."""
        first, end = self.reported
        return range(max(first, 1) - 1, max(end, 1) - 1)


@dataclass(slots=True)
class SteadyRows:
    """Sequences that do nothing but decode (see DecodeTable). Plans share it as long as they are the same.

    most     [n]: generated tokens of each at which it ends;  stops [n, S]: ids at which it does, padded with an id that does not exist
    records  [n]: the sequences', for whoever looks them up again and again; None: not looked up since one of them ended
    """

    sequences: list[Sequence]
    requests: list[EngineRequest]
    slots: NDArray[np.int32]
    most: NDArray[np.int64]
    stops: NDArray[np.int64]
    records: NDArray[np.int64] | None = None


@dataclass(slots=True)
class StepPlan:
    """One step: a row (or a tree's rows) for each of `decodes`, whose last token the device knows and perhaps the host does not, then
    the chunks; and in forward passes of their own the rows of searches.

    tree            what the decodes guess, None: nothing
    admitted        sequences that got a slot: their state must be written to the device first
    steady          the first of `decodes`, if some are steady
    table_updates   (slot, column, block) entries of the block tables to be written first, as three parallel lists
    copies          (block, new block, rows): the beginning of a block that a sequence (or beam) shares with another and is about to
                    write to, to be copied first
    beams           of beam search: a row for each beam of their groups
    contrasted      of contrastive search: a row for each candidate; ordered by their number
    contrasted_chunks   likewise, prompts: all hidden states are kept, and no token is chosen
    guided          of contrastive decoding: a row each
    """

    step: int
    tree: Tree | None = None
    admitted: list[Sequence] = field(default_factory=list)
    decodes: list[Sequence] = field(default_factory=list)
    steady: SteadyRows | None = None
    chunks: list[Chunk] = field(default_factory=list)
    table_slots: list[int] = field(default_factory=list)
    table_columns: list[int] = field(default_factory=list)
    table_blocks: list[int] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    beams: list[Sequence] = field(default_factory=list)
    contrasted: list[Sequence] = field(default_factory=list)
    contrasted_chunks: list[Chunk] = field(default_factory=list)
    guided: list[Sequence] = field(default_factory=list)

    @property
    def rows(self) -> int:
        searches = sum(sequence.step_rows for sequence in (*self.beams, *self.contrasted, *self.guided))
        chunks = sum(chunk.rows for chunk in (*self.chunks, *self.contrasted_chunks))
        return len(self.decodes) * self.nodes + chunks + searches

    @property
    def amateur_chunks(self) -> list[Chunk]:
        """Those of `chunks` that the second model of contrastive decoding computes, too."""
        return [chunk for chunk in self.chunks if chunk.sequence.strategy is Strategy.CONTRASTIVE_DECODING]

    @property
    def has_search(self) -> bool:
        return bool(self.beams or self.contrasted or self.contrasted_chunks or self.guided or self.amateur_chunks)

    @property
    def nodes(self) -> int:
        """Rows of each decode."""
        return 1 if self.tree is None else self.tree.size

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences of `decodes` and `chunks` that get new tokens, in the order of the sampler's rows."""
        return self.decodes + [chunk.sequence for chunk in self.chunks if chunk.final]

    @property
    def num_steady(self) -> int:
        return 0 if self.steady is None else len(self.steady.sequences)

    @property
    def unsteady(self) -> list[Sequence]:
        """The rest of `sampled`."""
        return self.sampled[self.num_steady :]

    @property
    def decode_slots(self) -> NDArray[np.int32]:
        slots = np.array([sequence.slot for sequence in self.decodes[self.num_steady :]], dtype=np.int32)
        return slots if self.steady is None else np.concatenate((self.steady.slots, slots))

    @property
    def chosen(self) -> list[Sequence]:
        """All sequences that get new tokens, but for beams."""
        return self.sampled + self.contrasted + self.guided

    @property
    def sequences(self) -> list[Sequence]:
        """Those of the rows of `decodes` and `chunks`."""
        return self.decodes + [chunk.sequence for chunk in self.chunks]

    @property
    def participants(self) -> list[Sequence]:
        prompts = [chunk.sequence for chunk in self.contrasted_chunks]
        return self.sequences + self.beams + self.contrasted + prompts + self.guided

    def add_blocks(self, sequence: Sequence, column: int, blocks: list[int]) -> None:
        self.table_slots += [sequence.slot] * len(blocks)
        self.table_columns += range(column, column + len(blocks))
        self.table_blocks += blocks

    def add_diff(self, diff: TableDiff) -> None:
        for slot, column, block in diff.entries:
            self.table_slots.append(slot)
            self.table_columns.append(column)
            self.table_blocks.append(block)
        self.copies += diff.copies
