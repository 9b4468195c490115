"""Creates the streams and buckets of a deployment. Every stage does so when it starts (of a secured one: every scheduler); all but
the first find them there."""

from __future__ import annotations

from shared import subjects
from shared.bus import BucketSpec, Bus, StreamSpec
from shared.config import StageSettings

JOB_ACK_WAIT = 30.0  # seconds that a tokenizer may be silent over a job before another gets it

# The log keeps what ended for this many attach windows, so that whoever may still attach finds all of it.
TOK_WINDOWS = 2


def stream_specs(settings: StageSettings) -> list[StreamSpec]:
    """The streams, by the settings that all stages share."""

    def spec(name: str) -> StreamSpec:
        subject = subjects.STREAM_SUBJECTS[name]
        return StreamSpec(name, subject, max_bytes=settings.stream_max_bytes, replicas=settings.replicas)

    return [
        spec(subjects.STREAM_JOBS)._replace(work_queue=True),
        spec(subjects.STREAM_RESULTS)._replace(max_age=settings.results_max_age),
        spec(subjects.STREAM_REQ),
        spec(subjects.STREAM_TOK)._replace(
            max_age=max(settings.tok_max_age, TOK_WINDOWS * settings.attach_window),
            # A request's partition follows from their number: with another one, its entries would be looked for elsewhere.
            metadata={"partitions": str(settings.partitions)},
        ),
        spec(subjects.STREAM_DEAD),
    ]


async def ensure_streams(bus: Bus, settings: StageSettings) -> None:
    """Idempotent. Raises IncompatibleStream if the token log exists with another number of partitions."""
    for stream in stream_specs(settings):
        await bus.ensure_stream(stream)
    for name in (subjects.BUCKET_ASSIGN, subjects.BUCKET_SNAPSHOT):
        await bus.ensure_bucket(BucketSpec(name, settings.replicas))
