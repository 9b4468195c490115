"""What a detokenizer measures of the streams that it serves, on the log's clock: the server's store times, whoever looks."""

from __future__ import annotations

from services.detokenizer.answer import Answer
from shared.metrics import Meter
from shared.micro import Endpoint
from shared.tracing import SpanEvent, Tracer


class Recorder:
    """One for all partitions of a process. A partition that catches up, or is not served any more, records nothing, so what was
    counted before a change of owners is not counted again.

    replays, prefixes, attaches   the endpoints that partitions answer on
    """

    def __init__(self, meter: Meter, tracer: Tracer, replays: Endpoint, prefixes: Endpoint, attaches: Endpoint) -> None:
        self._meter = meter
        self._tracer = tracer
        self.replays = replays
        self.prefixes = prefixes
        self.attaches = attaches
        self._snapshot = meter.histogram("gorgon_detokenizer_snapshot_seconds")
        self.inter_token = meter.histogram("gorgon_detokenizer_inter_token_seconds")
        self._first_token = meter.histogram("gorgon_detokenizer_time_to_first_token_seconds")
        self._request = meter.histogram("gorgon_detokenizer_request_seconds")
        self._completion = meter.histogram("gorgon_detokenizer_completion_tokens")

    def began(self, answer: Answer) -> None:
        """Its first tokens since this process serves the partition, which need not be the first of all."""
        if answer.first_at == answer.last_at:
            self._first_token.observe(answer.timings()["ttft_ms"] / 1e3)

    def taken(self) -> None:
        """A partition was taken over."""
        self._meter.count("gorgon_detokenizer_taken_total")

    def packed(self, seconds: float) -> None:
        """A snapshot was made."""
        self._snapshot.observe(seconds)

    def vanished(self) -> None:
        """A request's client does not listen any more."""
        self._meter.count("gorgon_detokenizer_vanished_total")

    def fenced(self) -> None:
        self._meter.count("gorgon_detokenizer_fences_total")

    def ended(self, answer: Answer) -> None:
        """Once a request: by the owner that wrote its tombstone."""
        assert answer.state.terminal is not None
        self._meter.count("gorgon_detokenizer_requests_ended_total", answer.state.terminal.reason)
        self._request.observe(answer.timings()["total_ms"] / 1e3)
        self._completion.observe(answer.completion_tokens)
        if self._tracer.enabled:
            self._trace(answer)

    def _trace(self, answer: Answer) -> None:
        """`deliver`, from OPEN to the end, both as the log has them."""
        state, terminal = answer.state, answer.state.terminal
        assert terminal is not None
        events = [SpanEvent("migrated", stamp, {"epoch": epoch}) for epoch, stamp in answer.fences]
        if answer.first_at:
            events.append(SpanEvent("first_token", answer.first_at))
        failure = terminal.failure
        error = (
            "" if terminal.reason != "error" else "error" if failure is None else f"{failure.code}: {failure.message}"
        )
        self._tracer.record(
            "deliver",
            answer.opened.trace,
            answer.opened_at,
            answer.ended_at,
            events=sorted(events, key=lambda event: event.when),
            error=error,
            request_id=state.key,
            epoch=state.epoch,
            reason=terminal.reason,
            completion_tokens=answer.completion_tokens,
        )
