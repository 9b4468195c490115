"""Places that tenants take in turns: whoever asks for many waits behind itself, not others behind it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque


class Turns:
    """`places`: as many hold one at a time. Each tenant's wait in order; the tenants get what is freed by turns."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._waiting.values()))

    def waiting_of(self, tenant: str) -> int:
        return len(self._waiting.get(tenant, ()))

    async def take(self, tenant: str) -> None:
        """Returns with a place, which `give_back` ends. May be cancelled."""
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back()  # it had just come
            else:
                self._withdraw(tenant, turn)
            raise

    def give_back(self) -> None:
        while self._waiting:
            tenant, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[tenant] = turns  # after the others
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _withdraw(self, tenant: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting[tenant]
        turns.remove(turn)
        if not turns:
            del self._waiting[tenant]
