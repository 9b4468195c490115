"""What the supervisor starts its children with."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from services.supervisor import ALLOCATOR, GATEWAY, STAGES, Plan, Supervisor
from shared.broker import BrokerError, free_ports


def test_stages_give_large_buffers_back_and_workers_keep_theirs(tmp_path: Path) -> None:
    stages = Supervisor(Plan(tmp_path, copies=dict.fromkeys((GATEWAY, *STAGES), 1))).stages
    for name, child in stages.items():
        assert (child.env.items() >= ALLOCATOR.items()) == (name != "model_worker-1")


def test_a_plan_may_say_otherwise(tmp_path: Path) -> None:
    stages = Supervisor(Plan(tmp_path, env=dict.fromkeys(ALLOCATOR, "1"))).stages
    assert stages["scheduler-1"].env.items() >= dict.fromkeys(ALLOCATOR, "1").items()


async def test_a_data_folder_has_one_deployment_at_a_time(tmp_path: Path) -> None:
    """Two servers that write one store would destroy it."""
    first = Supervisor(Plan(tmp_path, port=free_ports(1), copies={}))
    await first.start()
    try:
        configured = (tmp_path / "nats/nats.conf").read_text()
        with pytest.raises(BrokerError, match="in use"):
            Supervisor(Plan(tmp_path, port=free_ports(1), copies={}))
        assert (tmp_path / "nats/nats.conf").read_text() == configured, "the first one's server may have to start again"
    finally:
        await first.stop()
    second = Supervisor(Plan(tmp_path, port=free_ports(1), copies={}))
    await second.start()
    await second.stop()


@pytest.mark.parametrize("taken", ["nats", "http", "metrics"])
async def test_a_port_that_is_taken_is_named_before_anything_runs(tmp_path: Path, taken: str) -> None:
    first = free_ports(3)
    with socket.socket() as other:
        other.bind(("127.0.0.1", first))
        other.listen()
        ports = {"nats": first + 1, "http": first + 2, "metrics": 0} | {taken: first}
        plan = Plan(tmp_path, port=ports["nats"], copies={GATEWAY: 1, "scheduler": 1})
        plan.http_port, plan.metrics_port = ports["http"], ports["metrics"]
        supervisor = Supervisor(plan)
        with pytest.raises(BrokerError, match=str(first)):
            await supervisor.start()
        assert all(child.pid is None for child in supervisor.children())
