"""What this scheduler knows of the live requests: a cache of KV `assign`, never a source of truth. Pure.

Every change carries the key's revision, and only a higher one counts, so that this process's own writes (applied at once) and the
watch's echo of them (or of older ones) may come in any order.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from shared.messages import Assignment, Tombstone
from shared.subjects import split_request_key

REMEMBER_ENDED = 4096


@dataclass(slots=True)
class LiveRequest:
    """`since`: proven time (fleet.py) at which this scheduler learnt of the present assignment; `reported`: of its worker's last
    heartbeat that named it in the present epoch (None: not yet); `taken`: its worker has accepted this scheduler's order."""

    key: str
    assignment: Assignment
    revision: int
    since: float
    reported: float | None = None
    taken: bool = False

    @property
    def was_there(self) -> bool:
        """Whether its worker is known to have had it."""
        return self.taken or self.reported is not None


class Ledger:
    def __init__(self) -> None:
        self.live: dict[str, LiveRequest] = {}
        self._ended: OrderedDict[str, tuple[int, int]] = OrderedDict()  # key: (epoch, revision)
        self._by_worker: dict[str, dict[str, None]] = {}
        self._sequences: dict[str, int] = {}
        self._tenants: Counter[str] = Counter()  # sequences that have a worker

    def apply(self, key: str, value: Assignment | Tombstone | None, revision: int, proven: float) -> LiveRequest | None:
        """Takes a key's new value; None: it was deleted or has expired. Returns the request if it lived and this ended it."""
        present = self.live.get(key)
        known = present.revision if present is not None else self._ended.get(key, (0, 0))[1]
        if revision <= known:
            return None
        self._drop(key)
        self._ended.pop(key, None)
        if isinstance(value, Assignment):
            self.live[key] = LiveRequest(key, value, revision, proven)
            self._by_worker.setdefault(value.worker, {})[key] = None
            self._sequences[value.worker] = self._sequences.get(value.worker, 0) + value.choices
            self._count(key, value, 1)
            return None
        if value is not None:
            self._ended[key] = (value.epoch, revision)
            if len(self._ended) > REMEMBER_ENDED:
                self._ended.popitem(last=False)
        return present

    def _drop(self, key: str) -> None:
        if (present := self.live.pop(key, None)) is not None:
            worker = present.assignment.worker
            keys = self._by_worker[worker]
            del keys[key]
            self._sequences[worker] -= present.assignment.choices
            self._count(key, present.assignment, -1)
            if not keys:
                del self._by_worker[worker], self._sequences[worker]

    def _count(self, key: str, assignment: Assignment, sign: int) -> None:
        if assignment.worker:
            tenant = split_request_key(key)[0]
            self._tenants[tenant] += sign * assignment.choices
            if not self._tenants[tenant]:
                del self._tenants[tenant]

    def tenants(self) -> Mapping[str, int]:
        """Sequences of each tenant that workers have."""
        return self._tenants

    def taken(self, key: str, epoch: int) -> None:
        """The request's worker has accepted the order of this epoch."""
        if (live := self.live.get(key)) is not None and live.assignment.epoch == epoch:
            live.taken = True

    def on_worker(self, worker: str) -> list[str]:
        """Keys, in the order in which they came to it; of worker "": those that wait for one."""
        return list(self._by_worker.get(worker, ()))

    def sequences_on(self, worker: str) -> int:
        return self._sequences.get(worker, 0)

    def ended_epoch(self, key: str) -> int | None:
        """The epoch in which a request ended, None if it is not known to have ended."""
        return self._ended[key][0] if key in self._ended else None

    def oldest(self) -> int | None:
        """The smallest REQ sequence that a live request needs."""
        return min((r.assignment.req_seq for r in self.live.values()), default=None)
