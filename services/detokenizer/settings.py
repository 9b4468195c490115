from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from shared.config import StageSettings


class DetokenizerSettings(StageSettings):
    """Settings of the detokenizer stage. Times are seconds."""

    stage: ClassVar[str] = "detokenizer"

    snapshot_interval: float = Field(0.5, gt=0, description="seconds between snapshots of a partition, at least")
    beacon_interval: float = Field(0.1, gt=0, description="seconds between beacons of a partition")
    silence_grace: float = Field(
        0.5, gt=0, description="seconds of silence after which another detokenizer counts as gone"
    )
    vanished_after: float = Field(
        30.0, ge=0, description="seconds without a listener until a request is cancelled; 0: never"
    )
    durable_tokens: int = Field(64, ge=1, description="tokens of a durable request that share a stored event")
    durable_delay: float = Field(0.5, gt=0, description="seconds that a durable request's tokens wait for company")
