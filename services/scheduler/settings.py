from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from shared.config import StageSettings


class SchedulerSettings(StageSettings):
    """Settings of the scheduler stage. Times are seconds."""

    stage: ClassVar[str] = "scheduler"

    max_waiting: int = Field(1024, ge=1, description="requests that wait in this process; the rest waits in REQ")
    ack_wait: float = Field(10.0, gt=0, description="after which REQ hands a dead scheduler's requests to another")
    silence: float = Field(0.45, gt=0, description="silence after which a worker counts as lost")
    reconnect_grace: float = Field(
        1.5, gt=0, description="nobody counts as silent before this, after a loss of the link"
    )
    step_margin: float = Field(
        1.5, ge=1, description="a worker hangs when a step takes this many times its declared bound"
    )
    report_grace: float = Field(
        1.5, gt=0, description="a worker may not report a request for this long after it took it"
    )
    finish_grace: float = Field(
        60.0, gt=0, description="for the tombstone of a request that its worker reported, and does not report any more"
    )
    stuck_grace: float = Field(3.0, gt=0, description="a migration that stands still for this long is taken over")
    run_timeout: float = Field(0.5, gt=0, description="for a worker's answer to a run order")
    prefix_timeout: float = Field(1.2, gt=0, description="for an owner's answer to a prefix query")
    trim_interval: float = Field(10.0, gt=0, description="between trims of REQ")
    tenant_weights: dict[str, float] = Field(default_factory=dict, description="shares of tenants; others have 1.0")
