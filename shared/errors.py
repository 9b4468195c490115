"""The stable error codes of the public protocol, the exception that carries one to a client, and that of a stage that cannot start."""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """What a client may match on. A code never changes its meaning; messages may. See docs/protocol.md for each."""

    INVALID_REQUEST = "invalid_request"  # not decodable, wrong type, out of range, unknown field
    UNSUPPORTED = "unsupported"  # understood, but this deployment does not honour it
    UNKNOWN_MODEL = "unknown_model"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    ID_CONFLICT = "id_conflict"  # the request id is taken by a request with another body
    NOT_FOUND = "not_found"  # no such request (or it ended longer ago than the attach window)
    DEADLINE_EXCEEDED = "deadline_exceeded"
    OVERLOADED = "overloaded"
    STORAGE_FULL = "storage_full"
    UNAVAILABLE = "unavailable"  # a stage that is needed does not answer
    CONSTRAINT_FAILED = "constraint_failed"  # the grammar engine could not follow the text any further
    QUARANTINED = "quarantined"  # the request killed its worker, alone, twice
    INTERNAL = "internal"


RETRYABLE = frozenset({ErrorCode.OVERLOADED, ErrorCode.STORAGE_FULL, ErrorCode.UNAVAILABLE})


class GorgonError(Exception):
    """An error that a client is meant to see. `retry_after` is in seconds."""

    def __init__(self, code: ErrorCode, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after

    @property
    def retryable(self) -> bool:
        return self.code in RETRYABLE


class StartError(Exception):
    """What keeps a stage from starting and will not go away by itself: an operator has to mend it. `code` is stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
