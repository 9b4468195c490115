"""The gateway stage: HTTP on one side, NATS on the other. It holds no state that a request would need: any other gateway can go on
with any stream."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn

from services.gateway.app import build_app
from services.gateway.fleet import Fleet
from services.gateway.generation import Generations
from services.gateway.http_protocol import StreamingProtocol, cut, patient
from services.gateway.metrics import Metrics
from services.gateway.settings import GatewaySettings
from shared import codec, subjects
from shared.bus import Bus, Message
from shared.errors import StartError
from shared.messages import Heartbeat
from shared.service import Service

FORGET_EVERY = 60.0  # seconds
KEEP_ALIVE = 75  # longer than the idle time of usual proxies, so that it is they who close


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the stage's business (shared/service.py)."""
        yield


class GatewayService(Service):
    stage = "gateway"
    settings: GatewaySettings

    def __init__(self, bus: Bus, settings: GatewaySettings) -> None:
        super().__init__(bus, settings)
        self.port = settings.port
        self._fleet = Fleet()
        self._metrics = Metrics()
        self._metrics.expose(self)
        self._generations = Generations(bus, settings, self.spawn)
        self._server: _Server
        self._serving: asyncio.Task[None] | None = None

    async def on_start(self) -> None:
        await self.bus.subscribe(subjects.heartbeats(), self._on_heartbeat)
        await self._generations.start()
        app = build_app(self.settings, self.bus, self._fleet, self._generations, self._metrics, self.tracer)
        listener = _listen(self.settings.host, self.settings.port)
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            app,
            http=patient(self.settings.stall_timeout),
            loop="none",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=_graceful(self.settings),
        )
        self._server = _Server(config)
        self._serving = self.spawn(self._server.serve([listener]), "http")
        while not self._server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        self.spawn(self._forget_forever(), "fleet")
        self.log.info("listening", host=self.settings.host, port=self.port)

    async def on_drain(self) -> None:
        """No new connections; streams may end within the drain timeout. The others go on at another gateway when their clients come."""
        self._generations.closing = True
        self._server.should_exit = True
        # Before uvicorn ends what is left by exceptions.
        patience = max(0.2, _graceful(self.settings) - 0.5)
        timer = asyncio.get_running_loop().call_later(patience, self._give_up)
        for connection in self._connections():
            if connection.incomplete:
                connection.transport.close()
        if self._serving is not None:
            await asyncio.wait([self._serving])
        timer.cancel()

    def _give_up(self) -> None:
        self._generations.given_up.set()
        for connection in self._connections():
            if connection.stalled:
                cut(connection.transport, at_once=True)

    def _connections(self) -> list[StreamingProtocol]:
        return [c for c in self._server.server_state.connections if isinstance(c, StreamingProtocol)]

    async def on_stop(self) -> None:
        await self._generations.close()

    def heartbeat(self) -> Heartbeat:
        count = len(self._generations)
        return self.base_heartbeat(count / self.settings.max_streams, count, port=self.port)

    def _on_heartbeat(self, message: Message) -> None:
        self._fleet.hear(codec.decode(message.data), asyncio.get_running_loop().time())

    async def _forget_forever(self) -> None:
        while True:
            await asyncio.sleep(FORGET_EVERY)
            self._fleet.forget_old(asyncio.get_running_loop().time())


def _graceful(settings: GatewaySettings) -> int:
    """Seconds that calls have to end when the gateway does."""
    return max(1, int(settings.drain_timeout) - 1)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise StartError("cannot_listen", f"cannot listen on {host}:{port}: {error}") from None
    listener.setblocking(False)
    return listener
