"""Log lines: their fields, and their way to `gorgon tail`."""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from shared import logging as logging_module
from shared import subjects
from shared.config import StageSettings
from shared.logging import MAX_WAITING, REMEMBERED, attach_bus, configure_logging, detach_bus, note_request
from shared.memory_bus import MemoryBroker, MemoryBus


@pytest.fixture(autouse=True)
def undo() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    detach_bus()
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(StageSettings(log_format="json"), "toy")
    structlog.get_logger().bind(instance="i-1").info("started", epoch=3, request_id="t.r", extra=[1, {2}])
    (line,) = lines(capsys.readouterr().err)
    assert list(line) == ["ts", "level", "stage", "instance", "event", "request_id", "epoch", "extra"]
    assert (line["level"], line["stage"], line["event"], line["request_id"]) == ("info", "toy", "started", "t.r")


def test_levels_exceptions_and_standard_logging(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(StageSettings(log_format="json", log_level="warning"), "toy")
    log = structlog.get_logger()
    log.info("too low")
    try:
        raise ValueError("on purpose")
    except ValueError as error:
        log.error("failed", exc_info=error)
    logging.getLogger("library").warning("old %s", "style")
    logging.getLogger("library").info("too low")
    first, second = lines(capsys.readouterr().err)
    assert first["event"] == "failed" and "ValueError: on purpose" in str(first["exception"])
    assert (second["event"], second["logger"], second["level"]) == ("old style", "library", "warning")


def test_text_on_a_console(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(StageSettings(log_format="console"), "toy")
    structlog.get_logger().info("started", request_id="t.r")
    text = capsys.readouterr().err
    assert "started" in text and "t.r" in text and not text.startswith("{")


async def test_lines_are_published(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging_module, "PAUSE", 0.01)
    configure_logging(StageSettings(log_format="json"), "toy")
    broker = MemoryBroker()
    bus, listener = MemoryBus(broker), MemoryBus(broker)
    got: list[bytes] = []
    where: list[str] = []
    await listener.subscribe(subjects.logs(), lambda m: (got.extend(m.data.splitlines()), where.append(m.subject)))
    await asyncio.sleep(0.01)
    attach_bus(bus, "toy", "i-1")
    log = structlog.get_logger()
    log.info("first", request_id="t.r")
    thread = threading.Thread(target=lambda: log.info("from another thread"))
    thread.start()
    thread.join()
    await asyncio.sleep(0.05)
    assert [json.loads(line)["event"] for line in got] == ["first", "from another thread"]
    assert json.loads(got[0])["instance"] == "i-1"
    assert where == [subjects.log("toy", "i-1")]  # in one message
    assert got == capsys.readouterr().err.encode().splitlines()
    log.info("last")
    detach_bus()
    log.info("after")
    await asyncio.sleep(0.05)
    assert [json.loads(line)["event"] for line in got[2:]] == ["last"]


async def tapped() -> tuple[MemoryBroker, MemoryBus, list[bytes]]:
    """A process whose lines are published, its bus, and what somebody hears of them."""
    configure_logging(StageSettings(log_format="json"), "toy")
    broker = MemoryBroker()
    bus, listener = MemoryBus(broker), MemoryBus(broker)
    got: list[bytes] = []
    await listener.subscribe(subjects.logs(), lambda m: got.extend(m.data.splitlines()))
    attach_bus(bus, "toy", "i-1")
    return broker, bus, got


async def test_many_lines_do_not_wait(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the oldest of a burst would be dropped, which only those are for which there is no connection."""
    monkeypatch.setattr(logging_module, "PAUSE", 60.0)
    _, _, got = await tapped()
    log = structlog.get_logger()
    for turn in range(5):
        for i in range(MAX_WAITING // 2):
            log.info("line", number=turn * MAX_WAITING // 2 + i)
        await asyncio.sleep(0.02)
    detach_bus()
    await asyncio.sleep(0.02)
    assert [json.loads(line)["number"] for line in got] == list(range(5 * MAX_WAITING // 2))


async def test_while_there_is_no_connection_the_oldest_lines_go(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging_module, "PAUSE", 0.01)
    broker, bus, got = await tapped()
    broker.disconnect(bus)
    log = structlog.get_logger()
    for i in range(MAX_WAITING + 500):
        log.info("line", number=i)
    await asyncio.sleep(0.02)
    assert not got and bus.dropped == 0
    broker.reconnect(bus)
    await asyncio.sleep(0.05)
    assert [json.loads(line)["number"] for line in got] == list(range(500, MAX_WAITING + 500))


def test_trace_and_epoch_are_in_every_line_about_a_known_request(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(StageSettings(log_format="json"), "toy")
    log = structlog.get_logger()
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    note_request("t.r", trace=f"00-{trace_id}-b7ad6b7169203331-01")
    log.info("before any epoch", request_id="t.r")
    note_request("t.r", epoch=2)
    note_request("t.r", epoch=1)  # late news
    log.info("known", request_id="t.r")
    log.info("said", request_id="t.r", epoch=7)
    log.info("another", request_id="t.other")
    log.info("none")
    first, known, said, another, none = lines(capsys.readouterr().err)
    assert (first["trace_id"], "epoch" in first) == (trace_id, False)
    assert (known["trace_id"], known["epoch"]) == (trace_id, 2)
    assert said["epoch"] == 7
    assert not {"trace_id", "epoch"} & (another.keys() | none.keys())
    for number in range(REMEMBERED):
        note_request(f"t.{number}", epoch=1)
    log.info("forgotten", request_id="t.r")
    assert "trace_id" not in lines(capsys.readouterr().err)[0]


LOG_METHODS = {"debug", "info", "warning", "error", "critical", "exception"}


def test_log_calls_name_a_request_request_id() -> None:
    """So that `gorgon tail REQUEST` finds every line."""
    root = Path(__file__).resolve().parents[2]
    wrong = []
    for folder in ("shared", "services"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr in LOG_METHODS
                ):
                    wrong += [
                        f"{path.relative_to(root)}:{node.lineno} {keyword.arg}="
                        for keyword in node.keywords
                        if keyword.arg in {"request", "key", "req", "request_key"}
                    ]
    assert not wrong, f"a request is named request_id in log lines: {wrong}"
