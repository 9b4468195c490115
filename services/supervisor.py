"""One-machine mode: the embedded NATS server and every stage as child processes, restarted when they die.

Each child writes its log to `<data>/logs/<name>.log`. The supervisor holds no request state: killing it loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import structlog

log = structlog.get_logger()

# What a model needs. Stopped in this order: first who takes work in, last who delivers it.
STAGES = ("tokenizer", "scheduler", "model_worker", "detokenizer")
GATEWAY = "gateway"  # beside them, if wanted: HTTP
IN_ORDER = (GATEWAY, *STAGES)
BACKOFF = (0.05, 5.0)  # seconds before a restart: after a first death, and at most
HEALTHY_AFTER = 10.0  # seconds of life after which a death counts as a first one again
STOP_TIMEOUT = 15.0
# glibc raises its own threshold as soon as a large buffer is freed, and the next ones come from the heap, which does not shrink again.
# Not for workers: what torch allocates on a CPU is large and short-lived.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def _die_with_parent() -> None:
    """A child must not outlive a killed supervisor (Linux: PR_SET_PDEATHSIG)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@dataclass
class Child:
    """One supervised process. `command` is run again whenever it exits, until `stop`."""

    name: str
    command: list[str]
    log_path: Path
    env: dict[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0
    deaths: dict[int, int] = field(default_factory=dict)  # exit status by process id
    _task: asyncio.Task[None] | None = None
    _stopping: bool = False

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None and self.process.returncode is None else None

    async def start(self) -> None:
        await self._spawn()
        self._task = asyncio.create_task(self._keep_alive(), name=f"supervise {self.name}")

    async def _spawn(self) -> None:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as out:
            self.process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=os.environ | self.env,
                process_group=0,  # Ctrl-C reaches the supervisor only, which then stops the stages in order
                preexec_fn=_die_with_parent,
            )

    async def _keep_alive(self) -> None:
        loop = asyncio.get_running_loop()
        delay, longest = BACKOFF
        while True:
            assert self.process is not None
            born = loop.time()
            status = self.deaths[self.process.pid] = await self.process.wait()
            if self._stopping:
                return
            if loop.time() - born > HEALTHY_AFTER:
                delay = BACKOFF[0]
            log.warning("process_died", process=self.name, status=status, restart_in=delay, log=str(self.log_path))
            await asyncio.sleep(delay)
            if self._stopping:
                return
            delay = min(delay * 2, longest)
            self.restarts += 1
            await self._spawn()

    def kill(self, sig: signal.Signals) -> None:
        if self.pid is not None:
            os.kill(self.pid, sig)

    async def stop(self, wait: float = STOP_TIMEOUT) -> None:
        self._stopping = True
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            try:
                await asyncio.wait_for(self.process.wait(), wait)
            except TimeoutError:
                log.warning("killed", process=self.name, after=wait)
                self.process.kill()
                await self.process.wait()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


@dataclass
class Plan:
    """What to run: copies of each stage, further flags by stage, the environment of all, and where the server keeps its data.

    http_port    of the first gateway; the next ones get the ports after it
    modules      what is run as a stage (`python -m`) where that is not services.<stage>
    metrics_port  the first stage is scraped there, the others on the ports after it; 0: none is
    servers      of NATS: 1, or 3 that keep three copies of everything, on the ports after `port`
    store_limit  bytes that NATS may take on disk; 0: its own default
    secured      folder of `gorgon secure-config`: the server takes only its users, over TLS
    stages_url   where the stages find the server, if not at its own port
    """

    data: Path
    model: str = "demo"
    model_path: Path = Path("models/demo")
    port: int = 4222
    copies: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 1))
    flags: dict[str, list[str]] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    http_port: int = 8000
    modules: dict[str, str] = field(default_factory=dict)
    stages_url: str = ""
    store_limit: int = 0
    servers: int = 1
    metrics_port: int = 0
    secured: Path | None = None

    @property
    def nats_url(self) -> str:
        scheme = "nats" if self.secured is None else "tls"
        return ",".join(f"{scheme}://127.0.0.1:{port}" for port in self.server_ports)

    def connection(self, user: str) -> dict[str, Any]:
        """Settings with which that user connects."""
        if self.secured is None:
            return {}
        from services.secure_config import connection

        return connection(self.secured, user)

    @property
    def server_ports(self) -> list[int]:
        return [self.port + number for number in range(self.servers)]


def _lock(data: Path) -> TextIO:
    """Two servers that write one store would destroy it. Raises BrokerError."""
    from shared.broker import BrokerError

    data.mkdir(parents=True, exist_ok=True)
    locked = (data / "lock").open("a")
    try:
        fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        locked.close()
        raise BrokerError(f"{data} is in use by another deployment: --data names another folder") from None
    return locked


class Supervisor:
    """Starts the plan, keeps it running, stops it in order. The data folder is its own from the beginning until `stop`. Raises
    BrokerError if it is another's."""

    def __init__(self, plan: Plan) -> None:
        from shared.broker import Cluster, free_port, server_command

        self.plan = plan
        self._locked: TextIO | None = _lock(plan.data)  # before anything is written there
        self._ports = list(plan.server_ports)  # on which children listen
        logs = plan.data / "logs"
        names = ["nats"] if plan.servers == 1 else [f"nats-{number}" for number in range(1, plan.servers + 1)]
        routes = tuple(free_port() for _ in names)
        self.brokers = []
        for name, port, route in zip(names, plan.server_ports, routes, strict=True):
            cluster = Cluster(route, routes) if plan.servers > 1 else None
            server = server_command(
                plan.data / name,
                port,
                name=name,
                store_limit=plan.store_limit,
                cluster=cluster,
                secured=plan.secured / "nats.conf" if plan.secured is not None else None,
            )
            self.brokers.append(Child(name, server, logs / f"{name}.log"))
        self.broker = self.brokers[0]
        env = {"GORGON_LOG_FORMAT": "json", "PYTHONUNBUFFERED": "1"}
        env |= ({"GORGON_REPLICAS": str(plan.servers)} if plan.servers > 1 else {}) | plan.env
        self.stages: dict[str, Child] = {}
        for stage in IN_ORDER:
            for number in range(1, plan.copies.get(stage, 0) + 1):
                name = f"{stage}-{number}"
                command = [
                    sys.executable,
                    "-m",
                    plan.modules.get(stage, f"services.{stage}"),
                    "--nats-url",
                    plan.stages_url or plan.nats_url,
                    "--model",
                    plan.model,
                ]
                command += ["--model-path", str(plan.model_path), "--name", name]
                if stage == GATEWAY:
                    self._ports.append(plan.http_port + number - 1)
                    command += ["--port", str(self._ports[-1])]
                command += plan.flags.get(stage, [])
                if plan.metrics_port and stage != GATEWAY:  # which has its metrics where it serves
                    self._ports.append(plan.metrics_port + sum(not name.startswith(GATEWAY) for name in self.stages))
                    command += ["--metrics-port", str(self._ports[-1])]
                    command += ["--metrics-host", "127.0.0.1"]
                own = {f"GORGON_{key.upper()}": value for key, value in plan.connection(stage).items()}
                allocator = {} if stage == "model_worker" else ALLOCATOR
                self.stages[name] = Child(name, command, logs / f"{name}.log", allocator | env | own)

    async def start(self) -> None:
        """Raises BrokerError, before anything runs, if a port is taken."""
        from shared.broker import require_free, wait_until_ready

        require_free(self._ports)
        await asyncio.gather(*(broker.start() for broker in self.brokers))
        await asyncio.gather(*(wait_until_ready(port) for port in self.plan.server_ports))
        await asyncio.gather(*(child.start() for child in self.stages.values()))

    async def stop(self) -> None:
        for stage in IN_ORDER:
            await asyncio.gather(*(c.stop() for name, c in self.stages.items() if name.rsplit("-", 1)[0] == stage))
        await asyncio.gather(*(broker.stop() for broker in self.brokers))
        if self._locked is not None:
            self._locked.close()
            self._locked = None

    def children(self) -> list[Child]:
        return [*self.brokers, *self.stages.values()]
