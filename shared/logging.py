"""Structured logs: JSON lines on stderr (coloured text on a terminal), and the same lines on NATS for `gorgon tail`.

Every line begins with ts, level, stage, instance, event; a line about a request has request_id (`<tenant>.<id>`), and its trace_id and
epoch as soon as the stage knows them: `note_request` tells them once, no line has to repeat it.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import OrderedDict, deque
from typing import Any

import structlog
from structlog.typing import EventDict, WrappedLogger

from shared import subjects
from shared.bus import Bus, BusError
from shared.config import StageSettings
from shared.traceparent import trace_id_of

FIRST = ("ts", "level", "stage", "instance", "event", "request_id", "epoch", "trace_id")
REMEMBERED = 2048  # requests whose trace and epoch are known, the latest: what is live, and some that have ended
MAX_WAITING = 1000  # lines that wait for the bus
MAX_BATCH = 64 * 1024  # bytes of lines in one message
PAUSE = 0.1  # seconds for which lines are gathered into one message: at two lines a request they would be a tenth of its messages

_json = structlog.processors.JSONRenderer(default=repr)


class _Process:
    """What this process adds to every line, and where lines go besides stderr."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.tap: LogTap | None = None
        self.requests: OrderedDict[str, tuple[int, str]] = (
            OrderedDict()
        )  # epoch (0: none) and trace id ("": none) by key


_process = _Process()


class LogTap:
    """Publishes lines a little later, many together. Of more than MAX_WAITING that wait, the oldest are dropped."""

    def __init__(self, bus: Bus, subject: str) -> None:
        self._bus = bus
        self._subject = subject
        self._loop = asyncio.get_running_loop()
        self._lines: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._scheduled = False
        bus.on_reconnect(self._schedule)

    def add(self, line: bytes) -> None:
        """From any thread."""
        self._lines.append(line)
        if not self._scheduled:
            self._schedule()
        elif len(self._lines) == MAX_WAITING // 2 and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.publish)

    def _schedule(self) -> None:
        if not self._loop.is_closed():
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._loop.call_later, PAUSE, self.publish)

    def publish(self) -> None:
        """All that waits, now."""
        self._scheduled = False
        while self._lines and self._bus.connected_for > 0:  # else on_reconnect comes back to it
            batch = [self._lines.popleft()]
            size = len(batch[0])
            while self._lines and size + len(self._lines[0]) < MAX_BATCH:
                size += len(self._lines[0])
                batch.append(self._lines.popleft())
            try:
                self._bus.publish(self._subject, b"\n".join(batch))
            except BusError as error:
                print(f"log lines not published: {error!r}", file=sys.stderr)


def attach_bus(bus: Bus, stage: str, instance: str) -> None:
    """From now on every line is also published to subjects.log(stage, instance). Call it on the event loop."""
    _process.fields |= {"stage": stage, "instance": instance}
    _process.tap = LogTap(bus, subjects.log(stage, instance))


def note_request(key: str, epoch: int = 0, trace: str = "") -> None:
    """What this process knows of a request, for its log lines from now on. `trace`: W3C traceparent. What is not given stays."""
    requests = _process.requests
    known_epoch, known_trace = requests.get(key, (0, ""))
    requests[key] = (max(epoch, known_epoch), trace_id_of(trace) or known_trace)
    if len(requests) > REMEMBERED:
        requests.popitem(last=False)


def detach_bus() -> None:
    """Publishes what waits. Call it on the event loop."""
    if _process.tap is not None:
        _process.tap.publish()
    _process.tap = None


def _order(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    fields: dict[str, Any] = {**_process.fields, **event}
    if (known := _process.requests.get(fields.get("request_id", ""))) is not None:
        epoch, trace_id = known
        if epoch:
            fields.setdefault("epoch", epoch)
        if trace_id:
            fields.setdefault("trace_id", trace_id)
    return {name: fields[name] for name in FIRST if name in fields} | fields


class _Renderer:
    """A line for stderr, as text if it is a terminal; and as JSON for the tap."""

    def __init__(self, on_terminal: bool) -> None:
        self._console = structlog.dev.ConsoleRenderer(timestamp_key="ts", sort_keys=False) if on_terminal else None

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> str:
        line = ""
        if self._console is None or _process.tap is not None:
            line = str(_json(logger, method, dict(event)))
        if _process.tap is not None:
            _process.tap.add(line.encode())
        return line if self._console is None else self._console(logger, method, event)


class _FromStandardLogging(logging.Handler):
    """Lines of libraries that log with the standard library."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"logger": record.name}
        if record.exc_info:
            fields["exc_info"] = record.exc_info
        structlog.get_logger().log(record.levelno, record.getMessage(), **fields)


def configure_logging(settings: StageSettings, stage: str) -> None:
    """For a process: what it logs, and how."""
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    on_terminal = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    _process.fields = {"stage": stage}
    _process.requests.clear()
    _process.tap = None
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", key="ts"),
            structlog.processors.format_exc_info,
            _order,
            _Renderer(on_terminal),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),  # a line in one call; `print` makes two
    )
    logging.basicConfig(handlers=[_FromStandardLogging()], level=max(level, logging.INFO), force=True)
