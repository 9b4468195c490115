"""A deployment for the length of a block: for tests and benchmarks. (`gorgon up` has progress bars and signals of its own.)"""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.supervisor import Plan, Supervisor
from shared import presence
from shared.config import StageSettings
from shared.nats_bus import NatsBus

READY = 60.0
LINES = 20


@asynccontextmanager
async def running(plan: Plan, timeout: float = READY) -> AsyncIterator[tuple[Supervisor, NatsBus]]:
    """Every stage ready, and a connection to its server. If the block fails, the ends of all logs are printed. Raises TimeoutError."""
    supervisor = Supervisor(plan)
    bus: NatsBus | None = None
    try:
        await supervisor.start()
        bus = await NatsBus.connect(StageSettings(nats_url=plan.nats_url, **plan.connection("admin")))
        await presence.wait_for_stages(bus, plan.copies, plan.model, timeout)
        yield supervisor, bus
    except BaseException:
        for child in supervisor.children():
            tail = child.log_path.read_text().splitlines()[-LINES:] if child.log_path.exists() else []
            print(f"---- {child.name}, restarted {child.restarts} times", *tail, sep="\n", file=sys.stderr)
        raise
    finally:
        for child in supervisor.children():  # whoever stands still would not hear that it is to stop
            child.kill(signal.SIGCONT)
        if bus is not None:
            await bus.close()
        await supervisor.stop()
