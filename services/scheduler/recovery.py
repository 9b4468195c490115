"""What is wrong with a live request, and with what a worker runs. Pure."""

from __future__ import annotations

from services.scheduler.fleet import Fleet
from services.scheduler.ledger import Ledger, LiveRequest
from shared.messages import WorkerHeartbeat

# Reasons for a migration that are the death of a worker.
DEATHS = frozenset({"lost", "died", "hung", "missing"})


def diagnose(
    request: LiveRequest, fleet: Fleet, *, report_grace: float, finish_grace: float, stuck_grace: float
) -> str | None:
    """Why a live request needs a new worker, None if it does not: "missing", "draining", "unreported" or "stuck".

    The loss of a worker is not found here (Fleet.judge tells), but what was left over then: "missing".
    """
    worker = request.assignment.worker
    if worker == "":
        return "stuck" if fleet.silence_of(request.since) > stuck_grace else None
    if (known := fleet.workers.get(worker)) is None:
        return "missing" if fleet.silence_of(request.since) > report_grace else None
    if known.beat.running.get(request.key) == request.assignment.epoch:
        request.reported = known.heard
        return None
    if known.beat.base.draining:
        return "draining"
    # Only what a heartbeat leaves out is unreported: a worker that is silent may be lost, and that is for Fleet.judge to say.
    if request.reported is None or request.reported < request.since:
        return "unreported" if known.heard - request.since > report_grace else None
    # It has ended there and its finish is in the log. The tombstone is late because the partition's owner is behind, which a storm of
    # fences would only make worse.
    return "unreported" if known.heard - request.reported > finish_grace else None


def moved_because(verdict: str, request: LiveRequest, beat: WorkerHeartbeat) -> str:
    """Why a request leaves a worker that cannot go on; `beat`: the worker's last. Who came when the step hung already is only "behind":
    that must not count against it, as a step hangs for seconds, in which suspects may come one after the other. Nor must it count
    against a suspect that has come through several steps, only that the log did not take its tokens in time; unless the worker named
    who was in its last step."""
    held = beat.running.get(request.key) == request.assignment.epoch
    if held and request.key in beat.cleared and not beat.suspects:
        return "cleared"
    return "behind" if verdict == "hung" and (not held or request.key in beat.behind) else verdict


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
