"""The dependency that gives each route its caller."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from services.gateway.auth import Authenticator, Caller


def caller_of(request: Request) -> Caller:
    """Whose request it is. Raises ApiError 401."""
    authenticator: Authenticator = request.app.state.authenticator
    return authenticator.caller(request.headers)


CallerOf = Annotated[Caller, Depends(caller_of)]
