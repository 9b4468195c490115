"""What the stages measure: the list of all metrics, and where a stage keeps its figures. shared/metrics_exporter.py shows them to
Prometheus; docs/operations.md explains them.

Nothing here costs a hot path anything to speak of. Most figures are those of the heartbeat, which a stage makes anyway. The rest is
counted once a request or once a step, in plain dictionaries and lists that the event loop alone writes: another thread that reads
them may be one event late, nothing else.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

ALL_STAGES = ""


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Metric(NamedTuple):
    """source   where the figure comes from: "beat.<field>" of the heartbeat, "detail.<key>" of its detail, or "" for a stage's Meter.
             With a label, "detail.<prefix>_*" takes every key with that prefix, and the label is the rest of the key
    label    the one label besides stage, model and instance; "" for none
    buckets  upper bounds of a histogram, +Inf not included
    """

    name: str
    kind: Kind
    stage: str
    help: str
    source: str = ""
    label: str = ""
    buckets: tuple[float, ...] = ()


_SECONDS_SHORT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_SECONDS_STEP = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
_SECONDS_WAIT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_SECONDS_LONG = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
_POWERS = tuple(float(2**i) for i in range(13))

_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

CATALOG: tuple[Metric, ...] = (
    # ---- every stage
    Metric("gorgon_ready", _G, ALL_STAGES, "1 once the stage has started and takes work."),
    Metric("gorgon_start_time_seconds", _G, ALL_STAGES, "When this incarnation began, in seconds since the epoch."),
    Metric("gorgon_draining", _G, ALL_STAGES, "1 while the stage hands its work over.", "beat.draining"),
    Metric("gorgon_load_ratio", _G, ALL_STAGES, "How busy the stage is, 0 to 1.", "beat.load"),
    Metric("gorgon_in_flight_requests", _G, ALL_STAGES, "Requests that the stage works on.", "beat.in_flight"),
    Metric("gorgon_heartbeats_total", _C, ALL_STAGES, "Heartbeats sent.", "beat.beat"),
    Metric("gorgon_nats_connected_seconds", _G, ALL_STAGES, "Age of the connection to NATS; 0 while there is none."),
    Metric("gorgon_nats_dropped_messages_total", _C, ALL_STAGES, "Core messages not sent for want of a connection."),
    Metric(
        "gorgon_endpoint_requests_total", _C, ALL_STAGES, "Messages taken by a NATS micro endpoint.", label="endpoint"
    ),
    Metric(
        "gorgon_endpoint_errors_total",
        _C,
        ALL_STAGES,
        "Those of them that were answered with an error.",
        label="endpoint",
    ),
    Metric(
        "gorgon_endpoint_processing_seconds_total", _C, ALL_STAGES, "Time spent on answering them.", label="endpoint"
    ),
    # ---- tokenizer
    Metric("gorgon_tokenizer_accepted_total", _C, "tokenizer", "Requests stored in REQ.", "detail.accepted"),
    Metric("gorgon_tokenizer_repeated_total", _C, "tokenizer", "Requests that were in REQ already.", "detail.repeated"),
    Metric(
        "gorgon_tokenizer_dropped_total",
        _C,
        "tokenizer",
        "Requests without a reply subject that may be answered.",
        "detail.dropped",
    ),
    Metric(
        "gorgon_tokenizer_refused_total",
        _C,
        "tokenizer",
        "Requests refused, by error code.",
        "detail.refused_*",
        "code",
    ),
    Metric("gorgon_tokenizer_prompt_tokens_total", _C, "tokenizer", "Tokens of the prompts of accepted requests."),
    Metric(
        "gorgon_tokenizer_admission_seconds",
        _H,
        "tokenizer",
        "From a request's arrival to its place in REQ.",
        buckets=_SECONDS_SHORT,
    ),
    Metric(
        "gorgon_tokenizer_encode_seconds",
        _H,
        "tokenizer",
        "Validation, chat template and encoding of a request.",
        buckets=_SECONDS_SHORT,
    ),
    Metric("gorgon_tokenizer_backlog_requests", _G, "tokenizer", "Accepted requests of the model without a worker."),
    # ---- scheduler
    Metric("gorgon_scheduler_waiting_requests", _G, "scheduler", "New requests without a worker.", "detail.waiting"),
    Metric(
        "gorgon_scheduler_unplaced_requests", _G, "scheduler", "Migrated requests without a worker.", "detail.unplaced"
    ),
    Metric("gorgon_scheduler_live_requests", _G, "scheduler", "Live requests of the model.", "detail.live"),
    Metric("gorgon_scheduler_workers", _G, "scheduler", "Workers that this scheduler knows.", "detail.workers"),
    Metric("gorgon_scheduler_migrations_total", _C, "scheduler", "Migrations begun, by reason.", label="reason"),
    Metric("gorgon_scheduler_workers_gone_total", _C, "scheduler", "Workers given up, by verdict.", label="verdict"),
    Metric("gorgon_scheduler_runs_refused_total", _C, "scheduler", "Orders that a worker refused.", label="code"),
    Metric("gorgon_scheduler_quarantined_total", _C, "scheduler", "Requests that killed their workers, set apart."),
    Metric("gorgon_scheduler_cancelled_total", _C, "scheduler", "Requests ended by a cancel."),
    Metric(
        "gorgon_scheduler_queue_seconds",
        _H,
        "scheduler",
        "From a request's place in REQ to the worker that takes it.",
        buckets=_SECONDS_WAIT,
    ),
    Metric(
        "gorgon_scheduler_migration_seconds",
        _H,
        "scheduler",
        "From the decision to migrate to the worker that goes on.",
        buckets=_SECONDS_WAIT,
    ),
    # ---- model worker
    Metric("gorgon_worker_batch_sequences", _G, "model_worker", "Sequences that run.", "detail.batch"),
    Metric("gorgon_worker_waiting_sequences", _G, "model_worker", "Sequences that wait for a slot.", "detail.waiting"),
    Metric("gorgon_worker_slots", _G, "model_worker", "Sequences that can run at the same time.", "beat.max_seqs"),
    Metric("gorgon_worker_slots_free", _G, "model_worker", "Those of them that are free.", "detail.slots_free"),
    Metric("gorgon_worker_kv_blocks", _G, "model_worker", "Blocks of the KV cache.", "detail.kv_blocks_total"),
    Metric("gorgon_worker_kv_blocks_free", _G, "model_worker", "Those of them that are free.", "detail.kv_blocks_free"),
    Metric("gorgon_worker_tokens_total", _C, "model_worker", "Tokens generated.", "detail.tokens"),
    Metric(
        "gorgon_worker_prompt_tokens_total", _C, "model_worker", "Tokens of the prompts begun.", "detail.prompt_tokens"
    ),
    Metric(
        "gorgon_worker_prefix_hit_tokens_total",
        _C,
        "model_worker",
        "Those of them that the prefix cache had.",
        "detail.prefix_hits",
    ),
    Metric(
        "gorgon_worker_preemptions_total",
        _C,
        "model_worker",
        "Sequences that gave their blocks back, to be computed again.",
        "detail.preemptions",
    ),
    Metric("gorgon_worker_steps_total", _C, "model_worker", "Steps launched.", "beat.step"),
    Metric("gorgon_worker_step_age_seconds", _G, "model_worker", "Age of the step under way.", "beat.step_age"),
    Metric("gorgon_worker_step_seconds", _H, "model_worker", "Time of a step.", buckets=_SECONDS_STEP),
    Metric("gorgon_worker_step_sequences", _H, "model_worker", "Sequences that got tokens of a step.", buckets=_POWERS),
    Metric("gorgon_worker_runs_total", _C, "model_worker", "Orders to run, by what became of them.", label="outcome"),
    Metric("gorgon_worker_finished_total", _C, "model_worker", "Sequences that ended here, by reason.", label="reason"),
    Metric("gorgon_worker_queue_seconds", _H, "model_worker", "From an order to a slot.", buckets=_SECONDS_WAIT),
    Metric(
        "gorgon_worker_prefill_seconds", _H, "model_worker", "From a slot to the first token.", buckets=_SECONDS_WAIT
    ),
    Metric("gorgon_worker_outbox_messages", _G, "model_worker", "Messages the log has not taken.", "detail.outbox"),
    Metric("gorgon_worker_outbox_retries_total", _C, "model_worker", "Attempts to append that failed."),
    Metric("gorgon_worker_paused", _G, "model_worker", "1 while the outbox is full.", "detail.paused"),
    Metric(
        "gorgon_worker_drafted_total", _C, "model_worker", "Steps of a sequence in which tokens were guessed ahead."
    ),
    Metric(
        "gorgon_worker_accepted_tokens_total",
        _C,
        "model_worker",
        "Guesses accepted in them, by head: 1 + accepted / drafted is the acceptance length.",
        label="head",
    ),
    Metric(
        "gorgon_worker_tree_steps_total",
        _C,
        "model_worker",
        "Steps that decoded, by nodes of the tree; 1 is plain decoding.",
        label="nodes",
    ),
    # ---- detokenizer
    Metric("gorgon_detokenizer_partitions", _G, "detokenizer", "Partitions owned.", "detail.partitions"),
    Metric("gorgon_detokenizer_serving_partitions", _G, "detokenizer", "Those caught up with.", "detail.serving"),
    Metric("gorgon_detokenizer_backlog_messages", _G, "detokenizer", "Log messages not yet folded.", "detail.backlog"),
    Metric("gorgon_detokenizer_taken_total", _C, "detokenizer", "Partitions taken over."),
    Metric("gorgon_detokenizer_tokens_total", _C, "detokenizer", "Tokens committed while serving.", "detail.tokens"),
    Metric(
        "gorgon_detokenizer_requests_ended_total", _C, "detokenizer", "Requests ended, by how they did.", label="reason"
    ),
    Metric("gorgon_detokenizer_vanished_total", _C, "detokenizer", "Requests cancelled because nobody listens."),
    Metric("gorgon_detokenizer_fences_total", _C, "detokenizer", "Fences folded: each is a migration of a request."),
    Metric(
        "gorgon_detokenizer_time_to_first_token_seconds",
        _H,
        "detokenizer",
        "From a request's place in REQ to its first committed token.",
        buckets=_SECONDS_WAIT,
    ),
    Metric(
        "gorgon_detokenizer_inter_token_seconds",
        _H,
        "detokenizer",
        "Between two steps that brought tokens of one request: a token of each choice or, with speculation, several.",
        buckets=_SECONDS_STEP,
    ),
    Metric(
        "gorgon_detokenizer_request_seconds",
        _H,
        "detokenizer",
        "From a request's place in REQ to its end.",
        buckets=_SECONDS_LONG,
    ),
    Metric("gorgon_detokenizer_completion_tokens", _H, "detokenizer", "Tokens of an ended request.", buckets=_POWERS),
    Metric(
        "gorgon_detokenizer_snapshot_seconds",
        _H,
        "detokenizer",
        "Packing a partition's snapshot.",
        buckets=_SECONDS_SHORT,
    ),
)


def metrics_of(stage: str) -> list[Metric]:
    """The metrics that a stage has."""
    return [metric for metric in CATALOG if metric.stage in (ALL_STAGES, stage)]


class Histogram:
    """Counts by bucket. Not prometheus_client's: that one locks, and takes one value at a time, where a step brings a thousand equal
    ones. `bounds` are inclusive upper limits, ascending."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)


class Meter:
    """The figures of one stage that its heartbeat does not tell, by name of the metric. Names that the catalogue does not have for
    this stage are a KeyError at once.

    values   (metric, value of its label or ""): a counter's count, a gauge's value
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.values: dict[tuple[str, str], float] = defaultdict(float)
        mine = [metric for metric in metrics_of(stage) if not metric.source]
        self._histograms = {metric.name: Histogram(metric.buckets) for metric in mine if metric.kind is Kind.HISTOGRAM}
        self._labels = {metric.name: metric.label for metric in mine if metric.kind is not Kind.HISTOGRAM}
        for name, label in self._labels.items():
            if not label:
                self.values[name, ""] = 0.0  # so that a counter is there before it counts

    def count(self, name: str, label: str = "", by: float = 1) -> None:
        self._check(name, label)
        self.values[name, label] += by

    def set(self, name: str, value: float, label: str = "") -> None:
        """A gauge's value, or the total of a counter that is kept elsewhere."""
        self._check(name, label)
        self.values[name, label] = value

    def histogram(self, name: str) -> Histogram:
        return self._histograms[name]

    def _check(self, name: str, label: str) -> None:
        if bool(self._labels[name]) != bool(label):
            raise KeyError(f"{name} has the label {self._labels[name]!r}")
