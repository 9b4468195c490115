"""Ways to prove oneself to a real nats-server: certificates of both sides, and .creds files of a server run with JWTs."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nkeys
import pytest
from structlog.testing import capture_logs

from services.secure_config import connection, write_config
from shared.broker import free_port, server_command, wait_until_ready
from shared.config import StageSettings
from shared.nats_bus import NatsBus
from tests.protocol.systems import until


@asynccontextmanager
async def server(data: Path, config: Path) -> AsyncIterator[int]:
    port = free_port()
    command = server_command(data, port, secured=config)
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    try:
        await wait_until_ready(port)
        yield port
    finally:
        process.kill()
        await process.wait()


async def enters(url: str, **settings: Any) -> bool:
    """A stage waits for a server that does not let it in: it says so, and is refused again and again."""
    with capture_logs() as logs:
        connecting = asyncio.ensure_future(NatsBus.connect(StageSettings(nats_url=url, **settings)))
        await until(lambda: connecting.done() or any(entry["event"] == "waiting_for_nats" for entry in logs))
        if not connecting.done():
            await asyncio.wait([connecting], timeout=0.5)  # ten more attempts
    if not connecting.done():
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)
        return False
    if connecting.exception() is not None:
        return False
    await connecting.result().close()
    return True


async def test_a_server_that_asks_for_certificates(tmp_path: Path) -> None:
    config = write_config(tmp_path / "secured", mutual_tls=True)
    write_config(tmp_path / "other")
    ours, plain = (connection(tmp_path / "secured", "gateway", mutual_tls=both) for both in (True, False))
    theirs = connection(tmp_path / "other", "gateway", mutual_tls=True)
    async with server(tmp_path / "data", config) as port:
        url = f"tls://127.0.0.1:{port}"
        assert await enters(url, **ours)
        assert not await enters(url, **plain)
        strange = {name: theirs[name] for name in ("nats_tls_cert", "nats_tls_key")}
        assert not await enters(url, **(ours | strange))


class Party:
    """An operator, account or user with its key, and the JWTs that it signs (github.com/nats-io/jwt, version 2)."""

    def __init__(self, prefix: int) -> None:
        self.seed = nkeys.encode_seed(os.urandom(32), prefix)
        self.pair = nkeys.from_seed(bytearray(self.seed))
        self.name: str = self.pair.public_key.decode()

    def sign(self, subject: Party, name: str, claims: dict[str, Any]) -> str:
        body = dict(iat=int(time.time()), iss=self.name, name=name, sub=subject.name, nats=claims | {"version": 2})
        digest = hashlib.new("sha512_256" if "sha512_256" in hashlib.algorithms_available else "sha256")
        digest.update(json.dumps(body).encode())
        body["jti"] = base64.b32encode(digest.digest()).decode().rstrip("=")
        parts = [{"typ": "JWT", "alg": "ed25519-nkey"}, body]
        text = b".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in parts)
        signature: bytes = self.pair.sign(text)
        return (text + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


async def test_a_creds_file(tmp_path: Path) -> None:
    operator = Party(nkeys.PREFIX_BYTE_OPERATOR)
    system, account = Party(nkeys.PREFIX_BYTE_ACCOUNT), Party(nkeys.PREFIX_BYTE_ACCOUNT)
    user, stranger = Party(nkeys.PREFIX_BYTE_USER), Party(nkeys.PREFIX_BYTE_ACCOUNT)
    no_limits = dict(subs=-1, data=-1, payload=-1, imports=-1, exports=-1, wildcards=True, conn=-1, leaf=-1)
    preload = {
        party.name: operator.sign(party, name, {"type": "account", "limits": no_limits})
        for party, name in ((system, "SYS"), (account, "GORGON"))
    }
    config = tmp_path / "nats.conf"
    claims = {"type": "operator", "system_account": system.name}
    settings = {
        "operator": operator.sign(operator, "operator", claims),
        "resolver": "MEMORY",
        "resolver_preload": preload,
        "system_account": system.name,
    }
    config.write_text(json.dumps(settings))

    def creds(signer: Party) -> str:
        jwt = signer.sign(user, "stage", {"type": "user", "subs": -1, "data": -1, "payload": -1})
        path = tmp_path / f"{signer.name}.creds"
        path.write_text(
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
        )
        return str(path)

    async with server(tmp_path / "data", config) as port:
        url = f"nats://127.0.0.1:{port}"
        assert await enters(url, nats_credentials=creds(account))
        assert not await enters(url, nats_credentials=creds(stranger))
        assert not await enters(url)


def test_a_key_file_that_is_not_there(tmp_path: Path) -> None:
    async def connect() -> None:
        await NatsBus.connect(StageSettings(nats_url="nats://127.0.0.1:1", nats_nkey=str(tmp_path / "none")))

    with pytest.raises(OSError):
        asyncio.run(connect())
