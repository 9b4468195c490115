"""Refuses HTTP bodies that are too long, before they are in memory."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.errors import ApiError


class BodyLimit:
    """ASGI middleware. `most`: bytes."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        text = f"the body is longer than {self._most} bytes"
        if declared.isdigit() and int(declared) > self._most:
            error = ApiError(413, text, code="payload_too_large")
            headers = error.headers | {"connection": "close"}
            await JSONResponse(error.body, error.status, headers=headers)(scope, receive, send)
            return
        length = 0

        async def limited() -> Message:
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            if length > self._most:
                raise HTTPException(413, text)  # the one kind that FastAPI lets through while it reads a body
            return message

        await self._app(scope, limited, send)
