"""The HTTP application: routes of the OpenAI door and of the operator."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Annotated, Any

import structlog
from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from services.gateway.auth import Authenticator
from services.gateway.body_limit import BodyLimit
from services.gateway.completions import Completions
from services.gateway.errors import ApiError, refused, unknown_model
from services.gateway.fleet import Fleet
from services.gateway.generation import Generations
from services.gateway.identity import CallerOf
from services.gateway.key_first import KeyFirst
from services.gateway.metrics import Metrics
from services.gateway.page import page_router
from services.gateway.schema import ChatCompletionRequest, CompletionRequest, EmbeddingRequest, ErrorBody
from services.gateway.settings import GatewaySettings
from shared.bus import Bus
from shared.errors import StartError
from shared.tracing import Tracer

log = structlog.get_logger()

MAX_TIMEOUT = 86_400.0
MAX_KEY_CHARS = 255

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "the request is wrong, or asks for what is not to be had",
        401: "no or a wrong API key",
        404: "unknown model",
        409: "the Idempotency-Key belongs to a request with another body",
        413: "the body is too large",
        422: "the request has killed its workers",
        429: "overloaded; see Retry-After",
        499: "the request was cancelled",
        503: "a stage that is needed does not answer",
        504: "the deadline has passed",
    }.items()
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "the completion, or its server-sent events", "content": {"text/event-stream": {}}}
}


Timeout = Annotated[
    str | None, Header(alias="X-Request-Timeout", description="seconds from acceptance within which all must end")
]
Idempotency = Annotated[
    str | None, Header(alias="Idempotency-Key", description="the same key again joins the same request")
]
LastEvent = Annotated[
    str | None, Header(alias="Last-Event-ID", description="id of the last event seen: the stream goes on after it")
]


def build_app(
    settings: GatewaySettings, bus: Bus, fleet: Fleet, generations: Generations, metrics: Metrics, tracer: Tracer
) -> FastAPI:
    app = FastAPI(
        title="Gorgon",
        summary="The OpenAI door of a pipeline of actors on NATS",
        description="See docs/openai.md: what is honoured, how to resume a stream, what the errors mean.",
        docs_url=None,
        redoc_url=None,
    )
    try:
        app.state.authenticator = authenticator = Authenticator.from_file(settings.api_keys)
    except (OSError, ValueError) as error:
        raise StartError("unreadable_api_keys", str(error)) from None
    app.add_middleware(BodyLimit, most=settings.max_body_bytes)
    app.add_middleware(KeyFirst, authenticator=authenticator, metrics=metrics)
    completions = Completions(settings, bus, generations, metrics, tracer)
    started = asyncio.get_running_loop().time()

    def check_model(name: str) -> None:
        """Raises ApiError 404 for a model that nobody serves; one that was served lately may be about to come back."""
        now = asyncio.get_running_loop().time()
        if name in fleet.models(now) or fleet.remembers(name, now):
            return
        if now - started >= settings.model_grace and bus.connected_for >= settings.model_grace:
            raise unknown_model(name)
        raise ApiError(503, "the gateway has just started", type="server_error", code="unavailable", retry_after=1.0)

    @app.post("/v1/chat/completions", tags=["OpenAI"], response_model=None, responses=_STREAM | _ERRORS)
    async def chat_completions(
        request: Request,
        asked: ChatCompletionRequest,
        caller: CallerOf,
        timeout: Timeout = None,
        idempotency_key: Idempotency = None,
        last_event_id: LastEvent = None,
    ) -> Response:
        """A chat, rendered by the model's template."""
        check_model(asked.model)
        caller.count(asyncio.get_running_loop().time())
        deadline, key = _deadline(timeout), _key(idempotency_key)
        return await completions.chat(request, asked, caller, deadline, key, last_event_id)

    @app.post("/v1/completions", tags=["OpenAI"], response_model=None, responses=_STREAM | _ERRORS)
    async def text_completions(
        request: Request,
        asked: CompletionRequest,
        caller: CallerOf,
        timeout: Timeout = None,
        idempotency_key: Idempotency = None,
        last_event_id: LastEvent = None,
    ) -> Response:
        """The continuation of one prompt or several."""
        check_model(asked.model)
        caller.count(asyncio.get_running_loop().time())
        deadline, key = _deadline(timeout), _key(idempotency_key)
        return await completions.text(request, asked, caller, deadline, key, last_event_id)

    @app.post("/v1/embeddings", tags=["OpenAI"], responses=_ERRORS)
    async def embeddings(asked: EmbeddingRequest, caller: CallerOf) -> None:
        """No model of the pipeline computes embeddings: always an error."""
        check_model(asked.model)
        raise refused(f"model {asked.model!r} does not support embeddings", "model", code="unsupported")

    @app.get("/v1/models", tags=["OpenAI"], responses={401: _ERRORS[401]})
    async def models(caller: CallerOf) -> dict[str, Any]:
        """The models that are served now, as their heartbeats say."""
        now = asyncio.get_running_loop().time()
        return {"object": "list", "data": [_model(m, now) for m in fleet.models(now).values()]}

    @app.get("/v1/models/{model}", tags=["OpenAI"], responses={401: _ERRORS[401], 404: _ERRORS[404]})
    async def one_model(model: str, caller: CallerOf) -> dict[str, Any]:
        now = asyncio.get_running_loop().time()
        if (found := fleet.models(now).get(model)) is None:
            raise unknown_model(model)
        return _model(found, now)

    @app.get("/health", tags=["operation"])
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/ready", tags=["operation"], responses={503: {"description": "not connected, or no model is ready"}})
    async def ready() -> JSONResponse:
        """Whether requests can be served: NATS is there and every stage of some model."""
        now = asyncio.get_running_loop().time()
        served = [m.name for m in fleet.models(now).values() if m.ready]
        connected = bus.connected_for > 0
        good = connected and bool(served) and not generations.closing
        return JSONResponse({"ready": good, "connected": connected, "models": served}, 200 if good else 503)

    @app.get("/metrics", tags=["operation"])
    async def prometheus() -> Response:
        """For Prometheus."""
        metrics.in_flight.set(len(generations))
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(page_router(settings, bus, fleet, generations))

    def answer(request: Request, error: ApiError) -> JSONResponse:
        metrics.requests.labels(_route(request), str(error.status)).inc()
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(request, _invalid(error))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        code = "payload_too_large" if error.status_code == 413 else None
        said = ApiError(error.status_code, str(error.detail), code=code, headers=dict(error.headers or {}))
        return answer(request, said)

    @app.exception_handler(Exception)
    async def on_defect(request: Request, error: Exception) -> JSONResponse:
        log.error("defect", route=_route(request), exc_info=error)
        return answer(
            request, ApiError(500, "an internal error; the log has more", type="server_error", code="internal")
        )

    return app


def _route(request: Request) -> str:
    """The route's pattern: what clients make up must not become a label."""
    return str(getattr(request.scope.get("route"), "path", "other"))


def _model(model: Any, now: float) -> dict[str, Any]:
    """`created` is when this gateway first heard of the model."""
    row = dict(id=model.name, object="model", created=int(time.time() - (now - model.since)), owned_by="gorgon")
    return row | dict(max_model_len=model.context, ready=model.ready)


def _deadline(timeout: str | None) -> float | None:
    """Raises ApiError."""
    if timeout is None:
        return None
    try:
        seconds = float(timeout)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT:
        raise refused(f"X-Request-Timeout: seconds, above 0 and up to {MAX_TIMEOUT:.0f}", "X-Request-Timeout")
    return seconds


def _key(key: str | None) -> str | None:
    if key is not None and not 1 <= len(key) <= MAX_KEY_CHARS:
        raise refused(f"Idempotency-Key: 1 to {MAX_KEY_CHARS} characters", "Idempotency-Key")
    return key


def _invalid(error: RequestValidationError) -> ApiError:
    problems = error.errors()
    first = problems[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "header", "query", "path")]
    kind = first["type"]
    field = where[0][:80].encode("utf-8", "replace").decode() if where else None
    if tuple(first["loc"]) == ("body",) and kind == "model_attributes_type":
        return refused("the body is no JSON object, or was not sent as 'Content-Type: application/json'")
    if kind == "json_invalid":
        return refused("the body is not JSON")
    place = ".".join(where[:4])[:120].encode("utf-8", "replace").decode() or "body"
    if kind == "extra_forbidden":
        return refused(f"Unrecognized request argument supplied: {place}", field, code="unknown_parameter")
    if kind == "missing":
        name = field or "the body"
        return refused(f"Missing required parameter: '{name}'", field, code="missing_required_parameter")
    return refused(f"{place}: {first['msg']}", field, code="invalid_type")
