"""Who asks: maps a request to a tenant. This is the one place that knows about API keys.

The key file is TOML, one table a key; only the key's SHA-256 is in it (`printf %s KEY | sha256sum`):

    [keys.alice]
    sha256 = "9f86d081…"
    tenant = "alice"              # default: the table's name
    requests_per_minute = 600     # of generation, in each gateway; default: any number

Without a file everybody is let in as the default tenant.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.gateway.errors import INVALID_REQUEST, ApiError
from services.gateway.rate_limit import Bucket
from shared.api import DEFAULT_TENANT
from shared.subjects import TOKEN_RULE, is_token


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is. `bucket` counts what it asks for, if that is limited."""

    tenant: str = DEFAULT_TENANT
    bucket: Bucket | None = None

    def count(self, now: float) -> None:
        """A request that generates. Raises ApiError 429."""
        if self.bucket is not None:
            self.bucket.take(now)


class Authenticator:
    """`keys`: digest (hex) of a key → whose it is. None: no key is needed."""

    def __init__(self, keys: Mapping[str, Caller] | None = None) -> None:
        self._keys = keys

    @classmethod
    def from_file(cls, path: str) -> Authenticator:
        """Raises ValueError that names what is wrong with the file."""
        if not path:
            return cls()
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8")).get("keys", {})
        keys: dict[str, Caller] = {}
        for name, table in tables.items():
            digest, tenant = str(table.get("sha256", "")).lower(), str(table.get("tenant", name))
            if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
                raise ValueError(f"{path}: keys.{name}.sha256 is not a SHA-256 in hexadecimal")
            if not is_token(tenant):
                raise ValueError(f"{path}: keys.{name}.tenant: {TOKEN_RULE}")
            limit = table.get("requests_per_minute")
            if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or limit < 1):
                raise ValueError(f"{path}: keys.{name}.requests_per_minute: a number, at least 1")
            if unknown := table.keys() - {"sha256", "tenant", "requests_per_minute"}:
                raise ValueError(f"{path}: keys.{name}: unknown: {', '.join(sorted(unknown))}")
            keys[digest] = Caller(tenant, Bucket(limit) if limit is not None else None)
        return cls(keys)

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Raises ApiError 401. Looking a digest up tells nothing of a key by its timing."""
        if self._keys is None:
            return Caller()
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            message = "You didn't provide an API key. Send it in an Authorization header: 'Bearer KEY'"
            raise ApiError(401, message, code="missing_api_key", headers={"www-authenticate": "Bearer"})
        caller = self._keys.get(hashlib.sha256(key.strip().encode("latin-1")).hexdigest())
        if caller is None:
            raise ApiError(
                401,
                "Incorrect API key provided",
                type=INVALID_REQUEST,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return caller
