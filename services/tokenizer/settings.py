from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from shared.config import StageSettings


class TokenizerSettings(StageSettings):
    """Settings of the tokenizer stage. Times are seconds."""

    stage: ClassVar[str] = "tokenizer"

    max_context: int | None = Field(
        None, ge=2, description="tokens of prompt and completion; default: what workers say"
    )
    default_max_tokens: int = Field(256, ge=1, description="if neither the request nor generation_config.json says")
    max_request_bytes: int = Field(4 * 2**20, ge=1024, description="a longer request is refused unread")
    inline_bytes: int = Field(16384, ge=0, description="a longer request is handled in a thread")
    tool_format: Literal["auto", "none", "hermes", "llama3", "mistral"] = Field(
        "auto", description="how the model writes tool calls; auto: as its chat template says"
    )
    threads: int = Field(2, ge=1, description="for long requests")
    constraint_threads: int = Field(2, ge=1, description="that compile what requests demand of their text")
    constraint_timeout: float = Field(2.0, gt=0, description="a constraint that takes longer to compile is refused")
    max_constraints: int = Field(64, ge=1, description="constraints that wait to be compiled; more are refused")
    max_in_flight: int = Field(1024, ge=1, description="requests being admitted at a time in this process")
    max_waiting: int = Field(4096, ge=1, description="accepted requests that wait for a worker; more are refused")
    retry_after: float = Field(1.0, gt=0, description="what a refused client is told to wait")
    backlog_interval: float = Field(0.25, gt=0, description="between looks at the backlog")
    append_timeout: float = Field(1.0, gt=0, description="for NATS to acknowledge a request")
    append_attempts: int = Field(4, ge=1, description="to store a request; then the client is told `unavailable`")
    registry_grace: float = Field(
        1.0, gt=0, description="of listening before silence of a model's tokenizers means anything"
    )
    unknown_model_delay: float = Field(
        0.1, ge=0, description="before a model counts as unknown: it may be just starting"
    )
    jobs_in_flight: int = Field(64, ge=1, description="durable jobs being admitted at a time")
