"""NATS micro: every stage answers `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS`, so that `nats micro ls`, `info` and `stats` show the
deployment (specification: NATS ADR-32). The shapes of the answers are nats-py's own; the messages go through the Bus.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from nats.micro.service import EndpointInfo, EndpointStats, ServiceInfo, ServicePing, ServiceStats, ServiceVerb

from shared import subjects
from shared.bus import Bus, Message, Subscription


@cache
def gorgon_version() -> str:
    """Semantic version of the installed package."""
    try:
        return version("gorgon")
    except PackageNotFoundError:
        return "0.0.0"  # run from a folder that is not installed


class Endpoint:
    """A subject that a stage answers on, and what it has done there. `seconds`: time spent on the messages so far."""

    def __init__(self, name: str, subject: str, queue: str = "") -> None:
        self.name = name
        self.subject = subject
        self.queue = queue
        self.requests = 0
        self.errors = 0
        self.last_error = ""
        self.seconds = 0.0

    def done(self, seconds: float, error: str = "") -> None:
        """One message was answered; `error`, "code:description", if with one."""
        self.requests += 1
        self.seconds += seconds
        if error:
            self.errors += 1
            self.last_error = error

    def counting(self, handler: Callable[[Message], str | None]) -> Callable[[Message], None]:
        """The handler of a subscription that counts; what `handler` returns is the error, if there is one."""

        def count(message: Message) -> None:
            began = time.perf_counter()
            error: str | None = "internal:the handler failed"
            try:
                error = handler(message)
            finally:
                self.done(time.perf_counter() - began, error or "")

        return count

    def info(self) -> EndpointInfo:
        return EndpointInfo(self.name, self.subject, self.queue, {})

    def stats(self) -> EndpointStats:
        """Times are whole nanoseconds."""
        total = int(self.seconds * 1e9)
        return EndpointStats(
            self.name,
            self.subject,
            self.queue,
            self.requests,
            self.errors,
            total,
            total // max(1, self.requests),
            self.last_error,
        )


class MicroService:
    """Answers for one instance of a service. `endpoints` may grow while it runs."""

    def __init__(
        self,
        bus: Bus,
        name: str,
        instance: str,
        description: str,
        metadata: Mapping[str, str],
        endpoints: list[Endpoint],
    ) -> None:
        self._bus = bus
        self._name = name
        self._instance = instance
        self._description = description
        self._metadata = dict(metadata)
        self._endpoints = endpoints
        self._started = datetime.now(UTC)
        self._subscriptions: list[Subscription] = []

    async def start(self) -> None:
        answers: dict[ServiceVerb, Callable[[], Mapping[str, object]]] = {
            ServiceVerb.PING: lambda: self.ping().to_dict(),
            ServiceVerb.INFO: lambda: self.info().to_dict(),
            ServiceVerb.STATS: lambda: self.stats().to_dict(),
        }
        for verb, answer in answers.items():
            for subject in subjects.micro(verb.value, self._name, self._instance):
                self._subscriptions.append(await self._bus.subscribe(subject, self._answering(answer)))

    async def stop(self) -> None:
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        self._subscriptions.clear()

    def _answering(self, answer: Callable[[], Mapping[str, object]]) -> Callable[[Message], None]:
        def on_message(message: Message) -> None:
            if message.reply:
                self._bus.publish(message.reply, json.dumps(answer()).encode())

        return on_message

    def ping(self) -> ServicePing:
        return ServicePing(name=self._name, id=self._instance, version=gorgon_version(), metadata=self._metadata)

    def info(self) -> ServiceInfo:
        return ServiceInfo(
            name=self._name,
            id=self._instance,
            version=gorgon_version(),
            description=self._description,
            metadata=self._metadata,
            endpoints=[endpoint.info() for endpoint in self._endpoints],
        )

    def stats(self) -> ServiceStats:
        return ServiceStats(
            name=self._name,
            id=self._instance,
            version=gorgon_version(),
            started=self._started,
            metadata=self._metadata,
            endpoints=[endpoint.stats() for endpoint in self._endpoints],
        )
