"""How often a key may ask: a token bucket (the leaky bucket as a meter, ITU-T I.371) for each, of this process."""

from __future__ import annotations

from services.gateway.errors import ApiError


class Bucket:
    """`per_minute` requests, as many at once. `now` is always the loop's time, in seconds."""

    def __init__(self, per_minute: float) -> None:
        self._rate = per_minute / 60
        self._room = per_minute
        self._left = per_minute
        self._at = 0.0

    def take(self, now: float) -> None:
        """Raises ApiError 429 that tells when there is room again."""
        self._left = min(self._room, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            raise ApiError(
                429,
                f"Rate limit reached: {self._room:g} requests a minute",
                type="requests",
                code="rate_limit_exceeded",
                retry_after=(1 - self._left) / self._rate,
            )
        self._left -= 1
