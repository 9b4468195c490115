"""What the supervisor starts its children with."""

from __future__ import annotations

from pathlib import Path

from services.supervisor import ALLOCATOR, GATEWAY, STAGES, Plan, Supervisor


def test_stages_give_large_buffers_back_and_workers_keep_theirs(tmp_path: Path) -> None:
    stages = Supervisor(Plan(tmp_path, copies=dict.fromkeys((GATEWAY, *STAGES), 1))).stages
    for name, child in stages.items():
        assert (child.env.items() >= ALLOCATOR.items()) == (name != "model_worker-1")


def test_a_plan_may_say_otherwise(tmp_path: Path) -> None:
    stages = Supervisor(Plan(tmp_path, env=dict.fromkeys(ALLOCATOR, "1"))).stages
    assert stages["scheduler-1"].env.items() >= dict.fromkeys(ALLOCATOR, "1").items()
