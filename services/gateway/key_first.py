"""Refuses strangers before their bodies are read."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.auth import Authenticator
from services.gateway.errors import ApiError
from services.gateway.metrics import Metrics


class KeyFirst:
    """ASGI middleware, for what has a body. Routes ask for their caller all the same (see identity): this one only keeps out."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator, metrics: Metrics) -> None:
        self._app = app
        self._authenticator = authenticator
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            try:
                self._authenticator.caller(Headers(scope=scope))
            except ApiError as error:
                self._metrics.requests.labels("unread", str(error.status)).inc()
                # The connection stays, and the body is discarded: a client that still writes would find it reset, and no answer.
                await JSONResponse(error.body, error.status, headers=error.headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)
