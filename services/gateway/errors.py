"""What is wrong, said as OpenAI says it: a status code and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
import re
from typing import Any

from shared.errors import ErrorCode, GorgonError

INVALID_REQUEST = "invalid_request_error"
CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody is there to read it, but logs and metrics are

# Gorgon's code → status, OpenAI's error type, OpenAI's code where it has one of its own.
_OF_CODE: dict[ErrorCode, tuple[int, str, str | None]] = {
    ErrorCode.INVALID_REQUEST: (400, INVALID_REQUEST, None),
    ErrorCode.UNSUPPORTED: (400, INVALID_REQUEST, None),
    ErrorCode.UNKNOWN_MODEL: (404, INVALID_REQUEST, "model_not_found"),
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: (400, INVALID_REQUEST, None),
    ErrorCode.PAYLOAD_TOO_LARGE: (413, INVALID_REQUEST, None),
    ErrorCode.ID_CONFLICT: (409, INVALID_REQUEST, "idempotency_conflict"),
    ErrorCode.NOT_FOUND: (404, INVALID_REQUEST, None),
    ErrorCode.DEADLINE_EXCEEDED: (504, "timeout_error", None),
    ErrorCode.OVERLOADED: (429, "rate_limit_error", None),
    ErrorCode.STORAGE_FULL: (503, "server_error", None),
    ErrorCode.UNAVAILABLE: (503, "server_error", None),
    # Not a 5xx: clients send those again, and this one has killed two workers.
    ErrorCode.QUARANTINED: (422, INVALID_REQUEST, None),
    # Nor this one: the same constraint would fail again.
    ErrorCode.CONSTRAINT_FAILED: (422, INVALID_REQUEST, None),
    ErrorCode.INTERNAL: (500, "server_error", None),
}
_NAMED_FIELD = re.compile(r"(?:unknown fields: )?([a-z][a-z0-9_]*)(?:\.[^ :]*)?(?::|,|\Z)")


class ApiError(Exception):
    """An HTTP answer that is an error. `param` names the offending field; `retry_after` in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self._headers = headers or {}

    @classmethod
    def of(cls, error: GorgonError) -> ApiError:
        status, kind, code = _OF_CODE[error.code]
        param = None
        if error.code is ErrorCode.INVALID_REQUEST and (named := _NAMED_FIELD.match(error.message)):
            param = named.group(1)
        elif error.code is ErrorCode.UNKNOWN_MODEL:
            param = "model"
        after = error.retry_after if error.retry_after is not None else (1.0 if error.retryable else None)
        return cls(status, error.message, type=kind, param=param, code=code or str(error.code), retry_after=after)

    def rename(self, field: str, asked: str) -> None:
        """The pipeline's `field` is what the client calls `asked`."""
        if self.param == field:
            self.param = asked
            self.message = asked + self.message.removeprefix(field)

    def add_header(self, name: str, value: str) -> None:
        self._headers = self._headers | {name: value}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """`x-should-retry` is what OpenAI's clients obey before they look at the status."""
        headers = dict(self._headers)
        if self.retry_after is not None:
            headers["retry-after"] = str(math.ceil(self.retry_after))
            headers["x-should-retry"] = "true"
        elif self.status >= 409:
            headers["x-should-retry"] = "false"
        return headers


def refused(message: str, param: str | None = None, *, code: str | None = None) -> ApiError:
    """400: the request asks for what it cannot have."""
    return ApiError(400, message, param=param, code=code)


def unknown_model(model: str) -> ApiError:
    message = f"The model {model[:80]!r} does not exist"
    return ApiError(404, message, param="model", code="model_not_found")
