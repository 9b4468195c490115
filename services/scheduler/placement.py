"""Which worker a request goes to: one with room, where the beginning of its prompt is cached if that costs no balance. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import ceil

from services.scheduler.fleet import Worker
from services.scheduler.ledger import Ledger
from services.scheduler.suspicion import is_isolated
from shared.capabilities import Fields

CHUNK_BYTES = 4 * 64  # 64 token ids: a multiple of every block size in use
MAX_CHUNKS = 64
CHUNKS_PER_WORKER = 1 << 16  # 4 M tokens
# A worker's own queue may hold this share of its slots, so that a slot that becomes free is filled within the step.
BACKLOG = 0.125
# What a tenant that has its share already leaves free of a worker's slots while others are about, so that they need not wait for one.
RESERVE = 0.125
MIN_OVERLAP = 0.25  # of the prompt: less is not worth an imbalance
MAX_IMBALANCE = 0.25  # of the slots


def prefix_chunks(prompt_ids: bytes) -> list[int]:
    """Chained hashes of the prompt's beginning: two prompts share the first n exactly if they share their first n × 64 tokens."""
    chunks, parent = [], b""
    whole = len(prompt_ids) // CHUNK_BYTES
    for i in range(min(whole, MAX_CHUNKS)):
        parent = blake2b(parent + prompt_ids[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES], digest_size=8).digest()
        chunks.append(int.from_bytes(parent))
    return chunks


class PrefixIndex:
    """What each worker has lately been given, as a guess at what its prefix cache holds: a direct-mapped table of hashes, in which a
    new chunk takes the place of an older one. It has its full size, half a megabyte, from the first chunk on."""

    def __init__(self) -> None:
        self._seen: dict[str, array[int]] = {}

    def placed(self, worker: str, chunks: list[int]) -> None:
        seen = self._seen.get(worker)
        if seen is None:
            seen = self._seen[worker] = array("Q", bytes(8 * CHUNKS_PER_WORKER))
        for chunk in chunks:
            seen[chunk % CHUNKS_PER_WORKER] = chunk

    def overlap(self, worker: str, chunks: list[int]) -> int:
        """Leading chunks that the worker has been given before. The last one that is known stands for all before it, as the hashes
        are chained; some of those may have lost their place to others."""
        seen = self._seen.get(worker)
        if seen is not None:
            for count in range(len(chunks), 0, -1):
                if seen[chunks[count - 1] % CHUNKS_PER_WORKER] == chunks[count - 1]:
                    return count
        return 0

    def forget(self, worker: str) -> None:
        self._seen.pop(worker, None)


@dataclass(frozen=True, slots=True)
class Need:
    """What a request takes: `tokens` of prompt (and committed prefix), `choices` sequences (or beams), a worker without another
    suspect and one that knows its `fields`."""

    tokens: int
    choices: int = 1
    isolated: bool = False
    tenant: str = ""
    fields: Fields = field(default_factory=dict)


def in_use(worker: Worker, ledger: Ledger) -> int:
    """Sequences that the worker has or is about to get."""
    return ledger.sequences_on(worker.instance) + worker.reserved


def has_suspect(worker: Worker, ledger: Ledger) -> bool:
    """Whether the worker has a suspect that has not proven harmless: one whose epoch it reports, but not as isolated any more, has."""
    for key in ledger.on_worker(worker.instance):
        assignment = ledger.live[key].assignment
        proven = worker.beat.running.get(key) == assignment.epoch and key not in worker.beat.isolated
        if is_isolated(assignment) and not proven:
            return True
    return False


def has_room(worker: Worker, ledger: Ledger, need: Need, keep_free: bool = False) -> bool:
    used, slots = in_use(worker, ledger), worker.beat.max_seqs
    if used == 0:
        return True  # what does not even fit into an empty worker goes there all the same: the worker says why it cannot be
    if need.isolated and (worker.isolated_reserved or has_suspect(worker, ledger)):
        return False
    most = slots - ceil(slots * RESERVE) if keep_free else slots + int(slots * BACKLOG)
    if used + need.choices > most:
        return False
    return worker.beat.kv_tokens_free - worker.reserved_tokens >= need.tokens


def choose(
    workers: Sequence[Worker],
    ledger: Ledger,
    index: PrefixIndex,
    need: Need,
    chunks: list[int],
    keep_free: bool = False,
) -> Worker | None:
    """The worker for a request, None if all are full; `keep_free`: up to the places that are for others."""
    free = [w for w in workers if has_room(w, ledger, need, keep_free)]
    if not free:
        return None

    def load(worker: Worker) -> float:
        return in_use(worker, ledger) / worker.beat.max_seqs

    least = min(free, key=lambda w: (load(w), w.instance))
    best = max(free, key=lambda w: (index.overlap(w.instance, chunks), -load(w), w.instance))
    if (
        chunks
        and index.overlap(best.instance, chunks) >= MIN_OVERLAP * len(chunks)
        and load(best) - load(least) <= MAX_IMBALANCE
    ):
        return best
    return least
