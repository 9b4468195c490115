"""What goes into the token log: entries by partition, and those of sequences that just go on with few operations each. No NATS.

A plain entry (one without finish, log-probabilities or failure) is a tuple of the first five fields of `messages.Tokens`: the others
have their defaults and are not sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise

from services.model_worker.interface import EngineRequest, TokenRows
from shared import codec
from shared import messages as m

# Entries of one log message. With the most log-probabilities and the longest keys this is about 1 MB.
MAX_ENTRIES = 1000
# Bytes of their token ids and log-probabilities, about.
MAX_BYTES = 1 << 20
LOGPROBS_BYTES = 300  # of a token with the most alternatives

CLEARING_STEPS = 3  # one more than are in flight

PlainTokens = tuple[str, int, int, int, bytes]
Entry = m.Tokens | PlainTokens


@dataclass(slots=True)
class ActiveRun:
    """A request that this worker holds.

    lengths    number of generated tokens of each choice
    open       choices that go on
    unproven   choices of an isolated request that have not come one token further yet, in the log
    outputs    times that each of these came further, stored or not
    taken, admitted, first, last   loop time at which it came, got a slot, had its first and its last token here; 0 if not yet
    trace      traceparent of the order;  prefix: tokens generated elsewhere before
    cached     tokens of the prompt that were in the prefix cache
    """

    key: str
    epoch: int
    partition: int
    lengths: list[int]
    open: set[int]
    unproven: set[int]
    taken: float
    prompt: int
    prefix: int
    trace: str
    admitted: float = 0.0
    first: float = 0.0
    last: float = 0.0
    cached: int = 0
    outputs: Counter[int] = field(default_factory=Counter)

    @property
    def cleared(self) -> bool:
        """Whether its steps have harmed nobody. While the next one is under way its tokens say nothing of that one: so several."""
        return bool(self.unproven) and all(self.outputs[choice] >= CLEARING_STEPS for choice in self.unproven)


@dataclass(slots=True)
class Batch:
    """What a partition's log is to be given. `finished`: runs that end with it; `proven`: choices of suspects that come further with
    it; both count once it is stored."""

    entries: list[Entry] = field(default_factory=list)
    size: int = 0
    finished: list[ActiveRun] = field(default_factory=list)
    proven: list[tuple[ActiveRun, int]] = field(default_factory=list)

    def add(self, entry: m.Tokens) -> None:
        self.entries.append(entry)
        self.size += _size(entry)

    def messages(self) -> list[list[Entry]]:
        """Entries, in order, as they fit into log messages."""
        if len(self.entries) <= MAX_ENTRIES and self.size <= MAX_BYTES:
            return [self.entries]
        parts: list[list[Entry]] = []
        size = 0
        for entry in self.entries:
            own = _size(entry)
            size += own
            if not parts or len(parts[-1]) == MAX_ENTRIES or size > MAX_BYTES:
                parts.append([])
                size = own
            parts[-1].append(entry)
        return parts


def _size(entry: Entry) -> int:
    return len(entry[4]) + (LOGPROBS_BYTES * len(entry.logprobs or ()) if isinstance(entry, m.Tokens) else 0)


@dataclass(slots=True)
class _Lane:
    """Rows of a batch whose entries go to one partition: parallel lists."""

    rows: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)


class SteadyEntries:
    """Entries of TokenRows. Which run and partition each row belongs to is looked up once for as long as the batch stays the same."""

    def __init__(self, run_of: Callable[[EngineRequest], ActiveRun | None]) -> None:
        """`run_of`: the run that a row belongs to, None if its tokens are not wanted any more."""
        self._run_of = run_of
        self._requests: list[EngineRequest] | None = None
        self._lanes: dict[int, _Lane] = {}

    def forget(self) -> None:
        """A run has ended, or a choice of it: what was looked up no longer holds."""
        self._requests = None

    def add(self, rows: TokenRows, batches: dict[int, Batch]) -> bool:
        """False, and nothing is done, if a run's first token, or a suspect's, is among them: those are looked at one by one."""
        if rows.requests is not self._requests and not self._look_up(rows.requests):
            return False
        ids, positions = packed(rows.ids), rows.positions
        for partition, lane in self._lanes.items():
            batch = batches.setdefault(partition, Batch())
            at, new = [positions[row] for row in lane.rows], [ids[row] for row in lane.rows]
            batch.entries += zip(lane.keys, lane.choices, lane.epochs, at, new, strict=True)
            for lengths, choice, position, data in zip(lane.lengths, lane.choices, at, new, strict=True):
                batch.size += len(data)
                lengths[choice] = position + len(data) // 4
        return True

    def _look_up(self, requests: list[EngineRequest]) -> bool:
        self._requests, self._lanes = None, {}
        for row, request in enumerate(requests):
            run = self._run_of(request)
            if run is None:
                continue
            if not run.first or run.unproven:
                return False
            lane = self._lanes.setdefault(run.partition, _Lane())
            lane.rows.append(row)
            lane.keys.append(run.key)
            lane.choices.append(request.choice)
            lane.epochs.append(run.epoch)
            lane.lengths.append(run.lengths)
        self._requests = requests
        return True


def packed(rows: list[list[int]]) -> list[bytes]:
    """`codec.pack_ids` of each row."""
    data = codec.pack_ids(chain.from_iterable(rows))
    if len(data) == 4 * len(rows) and all(rows):
        return [data[at : at + 4] for at in range(0, len(data), 4)]
    ends = [0, *accumulate(4 * len(row) for row in rows)]
    return [data[start:end] for start, end in pairwise(ends)]
