"""A deployment to be harmed: two of each stage, and what must hold when it has been left alone for a moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from services.running import running
from services.supervisor import STAGES, Plan, Supervisor
from shared import codec, presence, subjects
from shared.broker import free_port, free_ports
from shared.bus import BusError
from shared.messages import Heartbeat, Tombstone, WorkerHeartbeat
from shared.nats_bus import NatsBus
from tests.chaos.faults import Injector
from tests.chaos.lossy_link import Link, lossy_link
from tests.pipeline.harness import complaints

COPIES = 2
MODEL = "chaos"
READY = 60.0
# A request of a scheduler that died before it could ack is delivered again after ack_wait.
QUIET = 40.0


@dataclass
class Deployment:
    supervisor: Supervisor
    bus: NatsBus
    injector: Injector
    link: Link | None = None

    @property
    def url(self) -> str:
        """Where stages and clients find the server; `bus` has a link that loses nothing."""
        return self.supervisor.plan.stages_url or self.supervisor.plan.nats_url

    async def until_ready(self) -> None:
        await presence.wait_for_stages(self.bus, self.supervisor.plan.copies, MODEL, READY)

    async def until_every_stage_serves(self) -> None:
        def served(beats: list[Heartbeat | WorkerHeartbeat]) -> bool:
            return {base.stage for beat in beats if not (base := presence.base_of(beat)).draining} == set(STAGES)

        beats: list[Heartbeat | WorkerHeartbeat] = []
        while not served(beats):
            with suppress(BusError):
                beats = await presence.gather(self.bus, 0.3, served)
            await asyncio.sleep(0.02)

    async def migrated(self) -> int:
        """Requests that ended lately in an epoch after their first."""
        assignments = await self.bus.bucket(subjects.BUCKET_ASSIGN)
        ends = [codec.decode(entry.value) for entry in await assignments.entries() if entry.value is not None]
        return sum(isinstance(end, Tombstone) and end.epoch > 1 for end in ends)

    async def unrest(self) -> list[str]:
        """What is not as it must be some time after the last fault and the last stream's end; empty as soon as all is well."""
        loop = asyncio.get_running_loop()
        until = loop.time() + QUIET
        while True:
            wrong = self.injector.unexplained()
            if not self.injector.settled:
                wrong.append("a process has not come back")
            else:
                await self.until_ready()
                beats = await presence.gather(self.bus, 1.0, lambda beats: len(beats) >= len(self.supervisor.stages))
                wrong += [complaint for beat in beats for complaint in complaints(beat) + _further_complaints(beat)]
            if not wrong or loop.time() > until:
                return wrong
            await asyncio.sleep(0.2)


def _further_complaints(beat: Heartbeat | WorkerHeartbeat) -> list[str]:
    base = presence.base_of(beat)
    counts = ("waiting", "live", "unplaced") if base.stage == "scheduler" else ("waiting",)
    return [f"{base.instance}: {base.detail[name]} {name}" for name in counts if base.detail.get(name)]


@asynccontextmanager
async def deployed(
    data: Path,
    model_path: Path,
    worker_flags: list[str],
    modules: dict[str, str] | None = None,
    copies: dict[str, int] | None = None,
    losses: tuple[int, float, float] | None = None,
    store_limit: int = 0,
    servers: int = 1,
    flags: dict[str, list[str]] | None = None,
) -> AsyncIterator[Deployment]:
    """`losses`: seed, and the shares of all messages that are dropped and delayed between the server and stages and clients, once
    the link is told to begin."""
    plan = Plan(
        data,
        MODEL,
        model_path,
        free_ports(servers),
        dict.fromkeys(STAGES, COPIES) | (copies or {}),
        {"model_worker": worker_flags} | (flags or {}),
        modules=modules or {},
        store_limit=store_limit,
        servers=servers,
    )
    async with AsyncExitStack() as stack:
        link: Link | None = None
        if losses is not None:
            port = free_port()
            plan.stages_url = f"nats://127.0.0.1:{port}"
            link = await stack.enter_async_context(lossy_link(port, plan.port, *losses))
        supervisor, bus = await stack.enter_async_context(running(plan, READY))
        yield Deployment(supervisor, bus, Injector(supervisor), link)
