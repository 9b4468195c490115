"""Which requests are suspected to kill their worker. Pure.

A process that is killed does not say why, so a death alone proves nothing. It counts against a request together with the one before
only if the request has not come one token further in between: what kills does so at the same position each time. After the second
such death the request is *isolated*: it runs in steps of its own, one such request a worker (which refuses another), until a token
further of it is in the log, which proves it harmless. Two deaths while isolated are its own doing: it is quarantined. A worker that
dies of an exception names the requests of its last step; they alone are suspected, and isolated at once. Of a step that hangs, those
that came to the worker when it had begun are not suspected.

A kill from outside would have to hit the same request four times in a row, each time before its next token is in the log, the last
two times while that is the only request that its worker computes. Where the log is slow to take tokens that is easily done: so the
death of a worker that a suspect has come through several steps with does not count (recovery.moved_because).
"""

from __future__ import annotations

from shared.messages import Assignment

ISOLATED = 2
GUILTY = 4


def after_death(assignment: Assignment, committed: int, named: bool) -> Assignment:
    """The assignment of a request whose worker died when `committed` of its tokens were in the log; `named`: by the worker itself."""
    deaths = assignment.suspect + 1 if committed == assignment.died_at else 1
    return assignment._replace(suspect=max(deaths, ISOLATED) if named else deaths, died_at=committed)


def is_isolated(assignment: Assignment) -> bool:
    return assignment.suspect >= ISOLATED


def is_guilty(assignment: Assignment) -> bool:
    return assignment.suspect >= GUILTY
