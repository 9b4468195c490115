"""The life of a stage: start → ready → drain → stop, with heartbeats. A background task that dies takes the process with it
(exit status ≠ 0), because a stage that lives on without one of its tasks is worse than one that the supervisor restarts.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import structlog

from shared import codec, subjects
from shared.bus import Bus, BusError, BusTimeout, Message
from shared.capabilities import KNOWN
from shared.config import StageSettings
from shared.errors import StartError
from shared.messages import Heartbeat, WorkerHeartbeat
from shared.metrics import Meter
from shared.micro import Endpoint, MicroService
from shared.tracing import open_tracer

if TYPE_CHECKING:
    from shared.metrics_exporter import MetricsExporter

log = structlog.get_logger()


class Service:
    """Base of the stages and the gateway. A subclass implements `on_start`, `on_drain`, `on_stop`, adds its figures in `heartbeat` and
    counts the rest in `meter`.

    Runs unchanged on the real bus (`run_stage`) and on the in-memory one (tests and the simulation call start, drain, stop).
    """

    stage: ClassVar[str]

    def __init__(self, bus: Bus, settings: StageSettings) -> None:
        self.bus = bus
        self.settings = settings
        self.instance = settings.incarnation()
        self.log = log.bind(stage=self.stage, instance=self.instance)
        self.draining = False
        self.ready = False
        self.failed: asyncio.Future[None] | None = None  # resolves to the exception of a dead task
        self.meter = Meter(self.stage)
        self.tracer = open_tracer(settings, self.stage, self.instance)
        self.last_beat: Heartbeat | WorkerHeartbeat | None = None
        self.endpoints: list[Endpoint] = []  # what NATS micro shows of the stage
        self._micro = MicroService(
            bus,
            subjects.micro_name(self.stage),
            self.instance,
            f"Gorgon's {self.stage} stage",
            {"stage": self.stage, "model": settings.model},
            self.endpoints,
        )
        self._exporter: MetricsExporter | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._beat = 0
        self._started = time.time()  # for people; no decision looks at it

    # ------------------------------------------------ for subclasses

    async def on_start(self) -> None:
        """Subscribe, load, take up work. The stage is ready when this returns."""

    async def on_drain(self) -> None:
        """Take no new work; hand over or finish what is there, within settings.drain_timeout."""

    async def on_stop(self) -> None:
        """Let go of resources. Must be safe after a failed start."""

    def heartbeat(self) -> Heartbeat | WorkerHeartbeat:
        return self.base_heartbeat()

    def base_heartbeat(self, load: float = 0.0, in_flight: int = 0, **detail: Any) -> Heartbeat:
        return Heartbeat(
            self.stage,
            self.settings.model,
            self.instance,
            self._beat,
            self.settings.heartbeat_interval,
            self.draining,
            load,
            in_flight,
            detail,
            KNOWN,
        )

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Runs a task for the life of the stage (or until it returns); its exception fails the stage."""
        task = asyncio.get_running_loop().create_task(coroutine, name=f"{self.stage}.{name}")
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def beat_now(self) -> None:
        """An extra heartbeat, for news that should not wait for the next one."""
        self._beat += 1
        subject = subjects.heartbeat(self.stage, self.settings.model, self.instance)
        self.last_beat = self.heartbeat()
        self.bus.publish(subject, codec.encode(self.last_beat))

    def endpoint(self, name: str, subject: str, queue: str = "") -> Endpoint:
        """A subject that the stage answers on, for NATS micro and the metrics. Count what is done there."""
        endpoint = Endpoint(name, subject, queue)
        self.endpoints.append(endpoint)
        return endpoint

    async def serve(self, name: str, subject: str, handler: Callable[[Message], str | None]) -> None:
        """Answers on an endpoint until the stage ends. `handler` returns "code:description" if it answered with an error."""
        await self.bus.subscribe(subject, self.endpoint(name, subject).counting(handler))

    @property
    def model(self) -> str:
        return self.settings.model

    def refresh_meter(self) -> None:
        """Before the figures are shown, on another thread: takes over what is counted elsewhere. Extend it, read only."""
        meter = self.meter
        meter.set("gorgon_ready", float(self.ready))
        meter.set("gorgon_start_time_seconds", self._started)
        meter.set("gorgon_nats_connected_seconds", self.bus.connected_for)
        meter.set("gorgon_nats_dropped_messages_total", self.bus.dropped)
        for endpoint in list(self.endpoints):
            meter.set("gorgon_endpoint_requests_total", endpoint.requests, endpoint.name)
            meter.set("gorgon_endpoint_errors_total", endpoint.errors, endpoint.name)
            meter.set("gorgon_endpoint_processing_seconds_total", endpoint.seconds, endpoint.name)

    # ------------------------------------------------ life

    async def start(self) -> None:
        self.failed = asyncio.get_running_loop().create_future()
        self.bus.on_closed(self.fail)
        if self.settings.metrics_port:
            from shared.metrics_exporter import MetricsExporter

            self._exporter = MetricsExporter(self)
            self._exporter.start(self.settings.metrics_host, self.settings.metrics_port)
        await self.on_start()
        self.ready = True
        await self.bus.subscribe(subjects.PS, self._answer_ps)
        await self._micro.start()
        self.spawn(self._beat_forever(), "heartbeat")
        self.log.info("ready", model=self.settings.model)

    async def drain(self) -> None:
        if self.draining:
            return
        self.draining = True
        self.beat_now()
        self.log.info("draining")
        try:
            async with asyncio.timeout(self.settings.drain_timeout):
                await self.on_drain()
        except TimeoutError:
            self.log.warning("drain_timeout", seconds=self.settings.drain_timeout)

    async def stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._exporter is not None:
            self._exporter.stop()
        await self.on_stop()
        await self.tracer.close()
        self.log.info("stopped")

    def fail(self, error: BaseException) -> None:
        """The stage cannot go on: the process ends with an exit status ≠ 0."""
        if self.failed is not None and not self.failed.done():
            self.failed.set_exception(error)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.log.error("task_died", task=task.get_name(), error=repr(error), exc_info=error)
            self.fail(error)

    async def _beat_forever(self) -> None:
        ready_file = Path(self.settings.ready_file) if self.settings.ready_file else None
        while True:
            self.beat_now()
            if ready_file is not None and self.ready and self.bus.connected_for > 0:
                ready_file.touch()
            await asyncio.sleep(self.settings.heartbeat_interval)

    def _answer_ps(self, message: Message) -> None:
        if message.reply:
            self.bus.publish(message.reply, codec.encode(self.heartbeat()))


async def _serve(service_class: type[Service], settings: StageSettings) -> int:
    from shared.logging import attach_bus, detach_bus
    from shared.nats_bus import NatsBus
    from shared.streams import ensure_streams

    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, stopping.set)
    connecting = loop.create_task(_connect(NatsBus, ensure_streams, settings))
    stop_wanted = loop.create_task(_wait_for(stopping.wait()))
    await asyncio.wait([connecting, stop_wanted], return_when=asyncio.FIRST_COMPLETED)
    if not connecting.done():
        connecting.cancel()
        return 0
    try:
        bus = connecting.result()
    except BusError as error:
        log.critical("cannot_start", error=str(error))
        return 1
    service = service_class(bus, settings)
    attach_bus(bus, service.stage, service.instance)
    status = 0
    try:
        starting = loop.create_task(service.start())
        await asyncio.wait([starting, stop_wanted], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return 0
        try:
            starting.result()
        except StartError as error:
            service.log.critical("cannot_start", code=error.code, error=error.message)
            return 1
        # What starting left behind is never garbage: looking through it again and again stops a stage for milliseconds at times.
        gc.collect()
        gc.freeze()
        assert service.failed is not None
        failure = loop.create_task(_wait_for(service.failed))
        await asyncio.wait([failure, stop_wanted], return_when=asyncio.FIRST_COMPLETED)
        if failure.done():
            status = 1
        else:
            failure.cancel()
            await service.drain()
    finally:
        await service.stop()
        detach_bus()
        await bus.close()
    return status


async def _wait_for(awaitable: Awaitable[Any]) -> None:
    with contextlib.suppress(Exception):
        await awaitable


async def _connect(bus_class: Any, ensure_streams: Any, settings: StageSettings) -> Bus:
    """Waits for NATS as long as it takes, and says so."""
    bus: Bus = await bus_class.connect(settings)
    while True:
        try:
            await ensure_streams(bus, settings)
            return bus
        except BusTimeout as error:
            log.warning("waiting_for_jetstream", error=str(error))
            await asyncio.sleep(1.0)


def run_stage(service_class: type[Service], settings_class: type[StageSettings]) -> None:
    """`python -m services.<stage>`: the process's main function."""
    import uvloop

    from shared.logging import configure_logging

    settings = settings_class.from_command_line()
    configure_logging(settings, service_class.stage)
    sys.exit(uvloop.run(_serve(service_class, settings)))
