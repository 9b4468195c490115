"""The web page: a chat and a live picture of the pipeline. Static files, a stream of what the heartbeats say and, where the gateway
was started for it (`dev_kill`), a way to kill a stage and watch the others go on."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import structlog
from fastapi import APIRouter, Header, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict

from services.gateway import siblings
from services.gateway.errors import ApiError
from services.gateway.fleet import Fleet
from services.gateway.generation import Generations
from services.gateway.identity import CallerOf
from services.gateway.settings import GatewaySettings
from services.gateway.sse import EventStream, Iterated
from shared.bus import Bus

log = structlog.get_logger()

STATIC = Path(__file__).resolve().parent / "static"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/static/page.css": ("page.css", "text/css; charset=utf-8"),
    "/static/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/static/icon.svg": ("icon.svg", "image/svg+xml"),
}
SECURITY = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
PERIOD = 0.4  # seconds between two pictures
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Kill(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    instance: str


def page_router(settings: GatewaySettings, bus: Bus, fleet: Fleet, generations: Generations) -> APIRouter:
    router = APIRouter(tags=["page"])
    # Whoever can read the picture may kill: other sites can send requests here, but not read what comes back.
    token = secrets.token_urlsafe(24)

    for path, (name, media_type) in FILES.items():
        router.add_api_route(path, _file(name, media_type), methods=["GET"], include_in_schema=False)

    def picture() -> dict[str, Any]:
        now = asyncio.get_running_loop().time()
        models = [
            dict(name=m.name, ready=m.ready, context=m.context, missing=sorted(m.missing))
            for m in fleet.models(now).values()
        ]
        return dict(
            connected=bus.connected_for > 0, models=models, stages=fleet.picture(now), following=len(generations)
        )

    async def pictures(token: str | None) -> AsyncIterator[bytes]:
        while not generations.closing:
            yield f"data: {json.dumps(picture() | {'kill': token}, separators=(',', ':'))}\n\n".encode()
            await asyncio.sleep(PERIOD)

    @router.get("/api/pipeline", response_model=None, responses={200: {"content": {"text/event-stream": {}}}})
    async def pipeline(request: Request, caller: CallerOf, once: bool = False) -> Response:
        """Server-sent events: the models, and every stage's load and requests in flight, as the heartbeats say. `once`: one
        picture as JSON."""
        may_kill = settings.dev_kill and _is_local(request)
        if once:
            return Response(json.dumps(picture()), media_type="application/json", headers=SECURITY)
        return EventStream(
            Iterated(pictures(token if may_kill else None)),
            SECURITY,
            keepalive=settings.keepalive,
            stall_timeout=settings.stall_timeout,
            on_close=lambda left: None,
        )

    @router.post("/api/kill", include_in_schema=False)
    async def kill(
        request: Request,
        asked: Kill,
        caller: CallerOf,
        given: Annotated[str, Header(alias="X-Gorgon-Token")] = "",
    ) -> dict[str, str]:
        """SIGKILL to one stage's process. For one's own machine: not there unless the gateway was started with `--dev-kill true`."""
        if not settings.dev_kill:
            raise ApiError(404, "Not Found")
        if (
            not _is_local(request)
            or not _is_same_origin(request)
            or not hmac.compare_digest(given.encode(), token.encode())
        ):
            raise ApiError(403, "only this gateway's own page may do that", code="forbidden")
        if not siblings.kill(asked.instance):
            raise ApiError(
                404, f"no process of {asked.instance[:80]!r} was started beside this gateway", code="not_found"
            )
        log.warning("killed_from_page", victim=asked.instance)
        return {"killed": asked.instance}

    return router


def _file(name: str, media_type: str) -> Any:
    data = (STATIC / name).read_bytes()

    async def answer() -> Response:
        return Response(data, media_type=media_type, headers=SECURITY)

    return answer


def _is_local(request: Request) -> bool:
    """From this machine, by a name of this machine: not through a name that somebody else's DNS points here."""
    try:
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:  # half an IPv6 address, say
        return False
    return host in LOOPBACK and request.client is not None and request.client.host in LOOPBACK


def _is_same_origin(request: Request) -> bool:
    """Browsers say where a POST comes from."""
    return request.headers.get("origin") == f"{request.url.scheme}://{request.headers.get('host', '')}"
