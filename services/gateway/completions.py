"""The two endpoints that generate: from a checked HTTP call to its answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import structlog
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from services.gateway.auth import Caller
from services.gateway.call import Call
from services.gateway.cursor import Cursor, parse_cursor
from services.gateway.errors import CLIENT_CLOSED_REQUEST, ApiError, refused
from services.gateway.generation import Generations, is_of, new_id
from services.gateway.metrics import Metrics
from services.gateway.render import ChatRenderer, CompletionRenderer
from services.gateway.schema import ChatCompletionRequest, Common, CompletionRequest
from services.gateway.settings import GatewaySettings
from services.gateway.sse import EventStream, Live, until_disconnected
from services.gateway.translate import chat_body, completion_bodies
from services.gateway.vocabulary import Vocabulary
from shared.bus import Bus
from shared.errors import ErrorCode, GorgonError
from shared.logging import note_request
from shared.subjects import request_key
from shared.traceparent import trace_id_of
from shared.tracing import Tracer

log = structlog.get_logger()


class Completions:
    def __init__(
        self, settings: GatewaySettings, bus: Bus, generations: Generations, metrics: Metrics, tracer: Tracer
    ) -> None:
        self._tracer = tracer
        self._settings = settings
        self._bus = bus
        self._generations = generations
        self._metrics = metrics
        self._vocabularies: dict[str, Vocabulary] = {}

    async def chat(
        self,
        request: Request,
        asked: ChatCompletionRequest,
        caller: Caller,
        deadline: float | None,
        key: str | None,
        last_event_id: str | None,
    ) -> Response:
        """Raises ApiError."""
        body = chat_body(asked, deadline)
        cursor = _cursor(asked, caller, key, last_event_id)
        renderer = ChatRenderer(
            cursor.base,
            cursor.created,
            asked.model,
            include_usage=_wants_usage(asked),
            logprobs=body.get("logprobs"),
        )
        call = self._call(asked, renderer, cursor, tools="tools" in body and body.get("tool_choice") != "none")
        return await self._answer(request, asked, caller, call, [body], cursor, key, last_event_id is not None)

    async def text(
        self,
        request: Request,
        asked: CompletionRequest,
        caller: Caller,
        deadline: float | None,
        key: str | None,
        last_event_id: str | None,
    ) -> Response:
        """Raises ApiError."""
        bodies = completion_bodies(asked, deadline, self._settings.max_prompts)
        cursor = _cursor(asked, caller, key, last_event_id)
        renderer = CompletionRenderer(
            cursor.base,
            cursor.created,
            asked.model,
            include_usage=_wants_usage(asked),
            logprobs=bodies[0].get("logprobs"),
        )
        call = self._call(asked, renderer, cursor, echo=bool(asked.echo))
        return await self._answer(request, asked, caller, call, bodies, cursor, key, last_event_id is not None)

    def _call(
        self,
        asked: Common,
        renderer: ChatRenderer | CompletionRenderer,
        cursor: Cursor,
        *,
        echo: bool = False,
        tools: bool = False,
    ) -> Call:
        options = asked.stream_options
        return Call(
            self._generations,
            renderer,
            cursor,
            self._vocabulary(asked.model),
            usage=_wants_usage(asked),
            continuous_usage=bool(options and options.continuous_usage_stats),
            echo=echo,
            tools=tools,
        )

    def _vocabulary(self, model: str) -> Vocabulary:
        if (vocabulary := self._vocabularies.get(model)) is None:
            vocabulary = self._vocabularies[model] = Vocabulary(self._bus, model)
        return vocabulary

    async def _answer(
        self,
        request: Request,
        asked: Common,
        caller: Caller,
        call: Call,
        bodies: list[dict[str, Any]],
        cursor: Cursor,
        key: str | None,
        resumed: bool,
    ) -> Response:
        began = asyncio.get_running_loop().time()
        route = "/v1/chat/completions" if isinstance(asked, ChatCompletionRequest) else "/v1/completions"
        headers = {"x-request-id": cursor.base}
        request_id = request_key(caller.tenant, cursor.base)
        span = self._tracer.begin(
            "http",
            _traceparent(request),
            request_id=request_id,
            route=route,
            model=asked.model,
            stream=bool(asked.stream),
            resumed=resumed,
        )
        if span.traceparent:
            note_request(request_id, trace=span.traceparent)
            for body in bodies:
                body["traceparent"] = span.traceparent
        try:
            await self._begin(asked, caller, call, bodies, cursor, key, resumed)
            working = asyncio.ensure_future(call.until_accepted() if asked.stream else call.whole())
            result = await self._unless_gone(request, working)
        except BaseException as error:
            call.close()
            span.end(error=str(error) or type(error).__name__)
            if isinstance(error, ApiError):
                if asked.structured is None:
                    error.rename("structured", "response_format")
                error.add_header("x-request-id", cursor.base)
            raise
        self._metrics.requests.labels(route, "200").inc()
        if not asked.stream:
            call.close()
            span.end()
            return JSONResponse(result, headers=headers)
        self._metrics.accepted_seconds.observe(asyncio.get_running_loop().time() - began)
        span.event("accepted")

        def on_close(left: bool) -> None:
            if left:
                self._metrics.disconnects.inc()
            call.close()
            span.end()

        return EventStream(
            Live(call, self._generations.round),
            headers,
            keepalive=self._settings.keepalive,
            stall_timeout=self._settings.stall_timeout,
            on_close=on_close,
            given_up=self._generations.given_up,
        )

    async def _begin(
        self,
        asked: Common,
        caller: Caller,
        call: Call,
        bodies: list[dict[str, Any]],
        cursor: Cursor,
        key: str | None,
        resumed: bool,
    ) -> None:
        choices = asked.n or 1
        if resumed:
            self._metrics.resumed.inc()
        for number, body in enumerate(bodies):
            request_id = cursor.base if number == 0 else f"{cursor.base}-{number}"
            if resumed:
                generation = await self._generations.resume(
                    asked.model, caller.tenant, request_id, survives=key is not None
                )
            else:
                patience = min(self._settings.accept_timeout, body.get("deadline", self._settings.accept_timeout))
                generation = await self._generations.begin(
                    asked.model, caller.tenant, request_id, body, survives=key is not None, patience=patience
                )
            call.read(generation, number * choices)

    async def _unless_gone(self, request: Request, working: asyncio.Future[Any]) -> Any:
        """The result, unless the client goes before it is there, or this gateway does. Raises ApiError 499 or 503 then."""
        gone = asyncio.ensure_future(until_disconnected(request.receive))
        given_up = asyncio.ensure_future(self._generations.given_up.wait())
        try:
            await asyncio.wait((working, gone, given_up), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            if given_up.done():
                raise ApiError.of(GorgonError(ErrorCode.UNAVAILABLE, "this gateway is being stopped", retry_after=1.0))
            self._metrics.disconnects.inc()
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client has gone", type="cancelled_error", code="cancelled")
        finally:
            for task in (working, gone, given_up):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task


def _traceparent(request: Request) -> str:
    """The caller's span, "" if it names none. A malformed header is ignored, as the W3C specification wants it."""
    given = request.headers.get("traceparent", "")
    return given if trace_id_of(given) else ""


def _wants_usage(asked: Common) -> bool:
    options = asked.stream_options
    return bool(options and options.include_usage)


def _cursor(asked: Common, caller: Caller, key: str | None, last_event_id: str | None) -> Cursor:
    """Where the client stands: at the beginning, or where its last event says. Raises ApiError."""
    if last_event_id is None:
        return Cursor(new_id(caller.tenant, key), int(time.time()))
    if not asked.stream:
        raise refused("Last-Event-ID: only a stream can be resumed", "Last-Event-ID")
    cursor = parse_cursor(last_event_id)
    if not is_of(caller.tenant, cursor.base):
        raise ApiError.of(GorgonError(ErrorCode.NOT_FOUND, "no such request"))
    if key is not None and cursor.base != new_id(caller.tenant, key):
        raise refused("Last-Event-ID and Idempotency-Key are of different requests", "Last-Event-ID")
    return cursor
