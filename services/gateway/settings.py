from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from shared.config import StageSettings


class GatewaySettings(StageSettings):
    """Settings of the gateway. Times are seconds. It serves every model that is live on its NATS: `model` is only what its own
    heartbeats go by."""

    stage: ClassVar[str] = "gateway"

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="of HTTP; 0 takes a free one")
    api_keys: str = Field("", description="file of hashed API keys and their tenants; none: everybody is let in")
    max_body_bytes: int = Field(4 * 2**20, ge=1024, description="a longer HTTP body is refused")
    max_prompts: int = Field(256, ge=1, description="prompts in one call of /v1/completions")
    max_streams: int = Field(4096, ge=1, description="requests followed at a time in this process; more are refused")
    accept_timeout: float = Field(15.0, gt=0, description="within which the pipeline must accept a request")
    reattach_grace: float = Field(
        30.0, ge=0, description="that a request with an Idempotency-Key goes on after its client has gone"
    )
    keepalive: float = Field(15.0, gt=0, description="of silence after which a stream gets a comment line")
    stall_timeout: float = Field(60.0, gt=0, description="after which a client that does not read is disconnected")
    model_grace: float = Field(1.0, ge=0, description="of listening before an unheard model counts as unknown")
    dev_kill: bool = Field(
        False,
        description="the web page may kill the processes that were started beside this one; for one's own machine only",
    )
