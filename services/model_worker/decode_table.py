"""Sequences that only decode, in arrays by slot: what a step changes of them is a few operations on arrays, however many they are.

A sequence is *steady* while it is in the table: it runs, samples, and no token of its steps needs more than to be appended. Its counts
(see Sequence) are then here; its own are as they were when it came. Whatever else happens to it takes it out first, which writes them
back: it ends, is preempted, may get its last token, or a token of a step planned before it came is to be taken. Pure: no tensors.
"""

from __future__ import annotations

from itertools import compress

import numpy as np
from numpy.typing import NDArray

from services.model_worker.interface import TokenRows
from services.model_worker.sequence import Sequence
from services.model_worker.step_plan import SchedulerLimits, SteadyRows

MAX_STOPS = 4  # ids that end a sequence; one with more never gets steady
_NO_STOP = -2  # -1 stands for no token
_NEVER = 1 << 60


class DecodeTable:
    """Arrays by slot, all counted up or down by what a step does:

    position   generated tokens that were read back
    togo       tokens that it may generate beyond those of the launched steps
    room       rows that its blocks hold beyond those that the launched steps may write, guesses included
    due        tokens to be read back until it has a block to be registered, or one before the window

    Lower bounds of the least `togo` and `room` are kept, so that most steps need not look.
    """

    def __init__(self, limits: SchedulerLimits, prefix_cache: bool) -> None:
        self._limits = limits
        self._prefix_cache = prefix_cache
        self._sequences: dict[Sequence, None] = {}  # a set that keeps its order
        self._rows: SteadyRows | None = None  # None: to be made anew
        self._steady = np.zeros(limits.max_seqs, dtype=bool)
        self._position, self._togo, self._room, self._due = np.zeros((4, limits.max_seqs), dtype=np.int64)
        self._least_togo = self._least_room = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._sequences

    @property
    def rows(self) -> SteadyRows:
        """All, in the order in which they came. The same object until somebody comes or goes."""
        if self._rows is None:
            sequences = list(self._sequences)
            most = max((len(sequence.stops) for sequence in sequences), default=0)
            stops = [[*s.stops, *[_NO_STOP] * (most - len(s.stops))] for s in sequences]
            self._rows = SteadyRows(
                sequences,
                [sequence.request for sequence in sequences],
                np.array([sequence.slot for sequence in sequences], dtype=np.int32),
                np.array([sequence.limit - sequence.prompt_len for sequence in sequences], dtype=np.int64),
                np.array(stops, dtype=np.int64).reshape(len(sequences), most),
            )
            self._least_togo = self._least_room = 0
        return self._rows

    # ---- who comes and goes

    @staticmethod
    def accepts(sequence: Sequence) -> bool:
        """For a running sequence that decodes. Its chunks have retired; and one whose prompt is only just in the cache may be
        waited for by its siblings, who look at its own counts."""
        return (
            sequence.plain
            and sequence.matcher is None
            and sequence.request.params.worker_logprobs is None
            and len(sequence.stops) <= MAX_STOPS
            and sequence.computed > sequence.prompt_len
            and sequence.verified == len(sequence.tokens) - 1
        )

    def enter(self, sequence: Sequence) -> None:
        slot = sequence.slot
        self._sequences[sequence] = None
        self._rows = None
        self._steady[slot] = True
        self._position[slot] = sequence.num_generated
        self._togo[slot] = sequence.limit - len(sequence.tokens) - sequence.pending
        self._room[slot] = len(sequence.blocks) * self._limits.block_size - sequence.computed - sequence.slack
        self.set_due(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Harmless if it is not here."""
        if sequence not in self._sequences:
            return
        del self._sequences[sequence]
        self._rows = None
        slot, length = sequence.slot, len(sequence.tokens)
        self._steady[slot] = False
        before = sequence.pending
        sequence.pending = sequence.limit - length - int(self._togo[slot])
        sequence.inflight += sequence.pending - before
        sequence.computed = length + sequence.pending - 1
        held = len(sequence.blocks) * self._limits.block_size
        sequence.slack = held - int(self._room[slot]) - sequence.computed
        sequence.verified = length - 1

    def clear(self) -> None:
        for sequence in list(self._sequences):
            self.leave(sequence)

    # ---- planning

    def drop_ending(self) -> None:
        """Those leave that may have all their tokens when the steps in flight have retired."""
        rows = self.rows
        if self._least_togo <= 0:
            togo = self._togo[rows.slots]
            if (togo <= 0).any():
                for sequence in list(compress(rows.sequences, togo <= 0)):
                    self.leave(sequence)
                self.drop_ending()
            else:
                self._least_togo = int(togo.min(initial=_NEVER))

    def missing(self, nodes: int) -> list[tuple[Sequence, int]]:
        """Who needs how many blocks more for a step with so many rows each."""
        rows, size = self.rows, self._limits.block_size
        if self._least_room >= nodes:
            return []
        room = self._room[rows.slots]
        self._least_room = int(room.min(initial=_NEVER))
        short = np.flatnonzero(room < nodes).tolist()
        return [(rows.sequences[row], -((int(room[row]) - nodes) // size)) for row in short]

    def grown(self, sequence: Sequence, blocks: int) -> None:
        self._room[sequence.slot] += blocks * self._limits.block_size

    def plan(self, depth: int) -> SteadyRows:
        """A step of all, which accepts up to `depth` guesses of each."""
        rows = self.rows
        self._togo[rows.slots] -= 1
        self._room[rows.slots] -= 1 + depth
        self._least_togo -= 1
        self._least_room -= 1 + depth
        return rows

    # ---- retiring

    def retire(
        self, rows: SteadyRows, ids: NDArray[np.int64], depth: int
    ) -> tuple[TokenRows, list[int], list[Sequence]]:
        """Takes the new tokens of a step planned for `rows`: ids [n, W], -1 behind the last. Returns what it took; the rows that it
        left, whose sequences end or are not steady any more (or again) and so take their tokens one by one; and the sequences that are
        due."""
        slots, sequences, requests, left = rows.slots, rows.sequences, rows.requests, []
        counts = None if ids.shape[1] == 1 else (ids >= 0).sum(axis=1)
        new: NDArray[np.int64] | int = 1 if counts is None else counts
        position = self._position[slots]
        usual = position + new < rows.most
        if rows is not self._rows:
            usual &= self._steady[slots]
        stopped = ids[:, :, None] == rows.stops[:, None, :]
        if stopped.any():
            usual &= ~stopped.any(axis=(1, 2))
        if not usual.all():
            left = np.flatnonzero(~usual).tolist()
            sequences, requests = list(compress(sequences, usual)), list(compress(requests, usual))
            slots, ids, position = slots[usual], ids[usual], position[usual]
            if counts is not None:
                new = counts = counts[usual]
        self._position[slots] = position + new
        if depth:
            self._room[slots] += depth
        if counts is not None:
            self._togo[slots] -= counts - 1
            self._least_togo -= ids.shape[1] - 1
            self._room[slots] -= counts - 1
        taken = TokenRows(requests, position.tolist(), id_lists(ids, counts))
        for sequence, tokens in zip(sequences, taken.ids, strict=True):
            sequence.tokens.extend(tokens)
        remaining = self._due[slots] - new
        self._due[slots] = remaining
        due = list(compress(sequences, remaining <= 0)) if remaining.min(initial=1) <= 0 else []
        for sequence in due:
            sequence.verified = len(sequence.tokens) - 1
        return taken, left, due

    def set_due(self, sequence: Sequence) -> None:
        """After blocks were registered or released."""
        size, window, verified = self._limits.block_size, self._limits.window, _NEVER
        if self._prefix_cache:
            verified = (sequence.registered + 1) * size
        if window:
            verified = min(verified, (sequence.released + 1) * size + window - 1)
        self._due[sequence.slot] = verified + 1 - len(sequence.tokens)


def id_lists(ids: NDArray[np.int64], counts: NDArray[np.int64] | None = None) -> list[list[int]]:
    """The first `counts` (None: all that are not -1) of each row."""
    rows: list[list[int]] = ids.tolist()
    if ids.shape[1] == 1:
        return rows
    counts = (ids >= 0).sum(axis=1) if counts is None else counts
    return [row[:count] for row, count in zip(rows, counts.tolist(), strict=True)]
