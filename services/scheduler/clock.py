"""The server's clock, as its stamps show it. Deadlines count from the time at which NATS stored the request; the clocks of two machines
are never compared.
"""

from __future__ import annotations

# Clocks drift apart: what was seen longer ago (between one and two of these) is forgotten. Seconds.
WINDOW = 300.0


class ServerClock:
    """A stamp that we see now was made earlier, so the server's clock shows at least that much: the largest difference of late is the
    nearest to the truth."""

    def __init__(self) -> None:
        self._since = 0.0
        self._ahead: float | None = None  # server's minus ours
        self._before: float | None = None  # the same in the window before

    def observe(self, stamp: float, now: float) -> None:
        """A message with this stamp (server's seconds) is here at `now` (loop's seconds)."""
        if now - self._since > WINDOW:
            self._before, self._ahead, self._since = self._ahead, None, now
        self._ahead = max(self._ahead if self._ahead is not None else stamp - now, stamp - now)

    def age(self, stamp: float, now: float) -> float:
        """Seconds since the stamp was made, 0 if that is not known."""
        known = [ahead for ahead in (self._ahead, self._before) if ahead is not None]
        return max(0.0, max(known) + now - stamp) if known else 0.0
