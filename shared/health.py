"""`python -m shared.health STAGE`: exit status 0 if a ready STAGE runs on this host. For container health checks."""

from __future__ import annotations

import asyncio
import socket
import sys

from shared.config import StageSettings
from shared.messages import Heartbeat, WorkerHeartbeat
from shared.nats_bus import NatsBus
from shared.presence import base_of, gather


async def healthy(stage: str) -> bool:
    settings = StageSettings()
    host = settings.name or socket.gethostname()
    async with asyncio.timeout(4):
        bus = await NatsBus.connect(settings)
        try:

            def found(beats: list[Heartbeat | WorkerHeartbeat]) -> bool:
                return any(base_of(b).stage == stage and base_of(b).instance.startswith(host) for b in beats)

            return found(await gather(bus, 2.0, found))
        finally:
            await bus.close()


if __name__ == "__main__":
    try:
        ok = asyncio.run(healthy(sys.argv[1]))
    except TimeoutError:
        ok = False
    sys.exit(0 if ok else 1)
