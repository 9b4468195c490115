"""What is wrong with a live request, and what a death says about the requests that took part in it. Pure.

Poison. A request whose worker died is suspected more with every death in which it made no progress: `suspect` counts the deaths in a
row at one and the same committed length. From ISOLATE on it runs in steps of its own, one such request a worker, so that from then
on a death is its own doing; at QUARANTINE it has killed alone, twice, at the same token. A kill from outside would have to hit the
same request at the same token four times in a row.
"""

from __future__ import annotations

from services.scheduler.fleet import Fleet
from services.scheduler.ledger import Ledger, LiveRequest
from shared.messages import Assignment

ISOLATE = 2
QUARANTINE = 4

DEATHS = frozenset({"lost", "died", "hung", "missing"})


def after_death(assignment: Assignment, committed: int) -> Assignment:
    """The assignment of a request whose worker died when `committed` of its tokens were in the log."""
    suspect = assignment.suspect + 1 if committed == assignment.died_at else 1
    return assignment._replace(suspect=suspect, died_at=committed)


def is_isolated(assignment: Assignment) -> bool:
    return assignment.suspect >= ISOLATE


def is_quarantined(assignment: Assignment) -> bool:
    return assignment.suspect >= QUARANTINE


def diagnose(request: LiveRequest, fleet: Fleet, now: float, *, report_grace: float, stuck_grace: float) -> str | None:
    """Why a live request needs a new worker, None if it does not: "missing", "draining", "unreported" or "stuck"."""
    worker = request.assignment.worker
    if worker == "":
        return "stuck" if fleet.link.silence_of(request.since, now) > stuck_grace else None
    if (known := fleet.workers.get(worker)) is None:
        return "missing" if fleet.is_missing(worker, now, report_grace) else None
    reported = known.beat.running.get(request.key) == request.assignment.epoch
    if reported:
        request.reported = now
        return None
    if known.beat.base.draining:
        return "draining"
    last = request.since if request.reported is None else max(request.reported, request.since)
    return "unreported" if fleet.link.silence_of(last, now) > report_grace else None


def stale_runs(running: dict[str, int], worker: str, ledger: Ledger) -> list[tuple[str, int]]:
    """(key, epoch) of what a worker reports though it ended, or goes on elsewhere or in a higher epoch."""
    stale = []
    for key, epoch in running.items():
        live = ledger.live.get(key)
        if live is not None:
            present = live.assignment
            if epoch < present.epoch or (epoch == present.epoch and present.worker not in ("", worker)):
                stale.append((key, epoch))
        elif ledger.ended_epoch(key) is not None:
            stale.append((key, epoch))
    return stale
