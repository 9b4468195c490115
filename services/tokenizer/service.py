"""The tokenizer stage: takes requests at both doors, validates and encodes them, and puts them into REQ."""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from services.tokenizer.admission import Addressee, Admission, Admitted, Refused, addressee_of
from services.tokenizer.constraints import ConstraintChecker
from services.tokenizer.encoder import Encoder
from services.tokenizer.jobs import JobResults, job_id
from services.tokenizer.model_files import ModelFiles, load_model_files
from services.tokenizer.pieces import Pieces
from services.tokenizer.registry import Presence, Registry
from services.tokenizer.settings import TokenizerSettings
from services.tokenizer.store import RequestStore
from shared import codec, subjects
from shared.api import DEFAULT_TENANT, accepted_event, decode_body, encode_for, encoding_of, error_event
from shared.bus import Bus, BusError, Consumer, Delivery, Message, Subscription
from shared.errors import ErrorCode, GorgonError
from shared.logging import note_request
from shared.messages import Heartbeat, PiecesQuery, PiecesReply, ReplyTo, WorkerHeartbeat
from shared.retry import until_done
from shared.service import Service
from shared.streams import JOB_ACK_WAIT
from shared.traceparent import generate as generate_trace
from shared.tracing import Span, wall_clock


class TokenizerService(Service):
    """`files` are read from settings.model_path unless given."""

    stage = "tokenizer"
    settings: TokenizerSettings

    def __init__(self, bus: Bus, settings: TokenizerSettings, files: ModelFiles | None = None) -> None:
        super().__init__(bus, settings)
        self._files = files
        self._registry = Registry()
        self._threads = ThreadPoolExecutor(settings.threads, "encode")
        self._counts: Counter[str] = Counter()
        self._doors: list[Subscription] = []
        self._jobs: list[Consumer] = []
        self._job_results = JobResults(bus)
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._waiting = 0  # requests without a worker, when last looked at
        self._stored_since = 0
        self._context: int | None = None
        self._listening_since = 0.0
        self._admission: Admission
        self._constraints: ConstraintChecker | None = None
        self._store: RequestStore
        self._encoder: Encoder
        self._pieces: Pieces
        self._generate = self.endpoint("generate", subjects.generate(settings.model), subjects.TOKENIZERS)
        self._encode_seconds = self.meter.histogram("gorgon_tokenizer_encode_seconds")
        self._admission_seconds = self.meter.histogram("gorgon_tokenizer_admission_seconds")

    # ------------------------------------------------ life

    async def on_start(self) -> None:
        settings = self.settings
        loop = asyncio.get_running_loop()
        files = self._files or await self._load()
        self._files_context = files.context
        if settings.tool_format != "auto":
            files = replace(files, tool_format="" if settings.tool_format == "none" else settings.tool_format)
        self._admission = Admission(files, settings.model, settings.default_max_tokens)
        self._encoder = files.encoder
        self._pieces = Pieces(files.encoder.tokenizer)
        self._constraints = ConstraintChecker(
            files,
            threads=settings.constraint_threads,
            timeout=settings.constraint_timeout,
            waiting=settings.max_constraints,
            retry_after=settings.retry_after,
        )
        bucket = subjects.BUCKET_ASSIGN
        assignments = await until_done("bucket", bucket, lambda: self.bus.bucket(bucket))
        self._store = RequestStore(self.bus, settings, assignments)
        for beats in (
            subjects.heartbeats(self.stage),
            subjects.heartbeats("scheduler", settings.model),
            subjects.heartbeats("model_worker", settings.model),
            subjects.heartbeats("detokenizer", settings.model),
        ):
            await self.bus.subscribe(beats, self._on_heartbeat)
        self._listening_since = loop.time()
        self._update_context()
        self.beat_now()  # before the door opens: others must not call the model unknown
        self._doors = [
            await self.bus.subscribe(subjects.generate(settings.model), self._on_request, queue=subjects.TOKENIZERS),
            await self.bus.subscribe(subjects.generate("*"), self._on_any_request, queue=subjects.FALLBACK),
            await self.bus.subscribe(subjects.pieces(settings.model), self._on_pieces, queue=subjects.TOKENIZERS),
            await self.bus.subscribe(
                subjects.of_tenant(subjects.generate(settings.model)), self._on_request, queue=subjects.TOKENIZERS
            ),
            await self.bus.subscribe(
                subjects.of_tenant(subjects.generate("*")), self._on_any_request, queue=subjects.FALLBACK
            ),
        ]
        for name, subject in subjects.job_consumers(settings.model).items():
            self._jobs.append(await until_done("consume", name, partial(self._take_jobs, name, subject)))
        self.spawn(self._watch_load(), "load")

    async def _take_jobs(self, name: str, subject: str) -> Consumer:
        limit = self.settings.jobs_in_flight
        stream = subjects.STREAM_JOBS
        return await self.bus.consume(stream, name, subject, self._on_job, limit=limit, ack_wait=JOB_ACK_WAIT)

    async def _load(self) -> ModelFiles:
        """In a thread: a large vocabulary takes a second, in which the connection must be kept alive."""
        path = Path(self.settings.model_path)
        return await asyncio.get_running_loop().run_in_executor(self._threads, load_model_files, path)

    async def on_drain(self) -> None:
        for door in self._doors:
            await door.unsubscribe()
        for jobs in self._jobs:
            await jobs.stop()
        await self._idle.wait()

    async def on_stop(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._constraints is not None:
            self._constraints.close()

    def heartbeat(self) -> Heartbeat:
        load = self._in_flight / self.settings.max_in_flight
        return self.base_heartbeat(load, self._in_flight, **self._counts)

    def refresh_meter(self) -> None:
        super().refresh_meter()
        self.meter.set("gorgon_tokenizer_backlog_requests", self._waiting + self._stored_since)

    # ------------------------------------------------ load

    def _on_heartbeat(self, message: Message) -> None:
        beat = codec.decode(message.data)
        self._registry.hear(beat, asyncio.get_running_loop().time())
        if isinstance(beat, WorkerHeartbeat):  # a worker has come whose context may be longer than the files say
            self._update_context()

    def _update_context(self) -> None:
        """A live worker knows better than the model's files what it can hold."""
        known = self._registry.context(self.settings.model, asyncio.get_running_loop().time())
        limits = [known if known is not None else self._files_context, self.settings.max_context]
        self._context = min((limit for limit in limits if limit is not None), default=None)

    async def _watch_load(self) -> None:
        settings = self.settings
        consumers = [subjects.consumer_req(settings.model, c) for c in range(settings.tenant_classes)]
        while True:
            stored_before = self._stored_since
            try:
                backlog = sum([await self.bus.backlog(subjects.STREAM_REQ, name) for name in consumers])
                self._waiting = backlog + self._registry.waiting(settings.model, asyncio.get_running_loop().time())
                self._stored_since -= stored_before
            except BusError as error:
                self.log.debug("backlog_unknown", error=repr(error))
            self._update_context()
            self._registry.forget_old(asyncio.get_running_loop().time())
            for jobs in () if self.draining else self._jobs:
                jobs.set_limit(settings.jobs_in_flight if self._overload() is None else 0)
            await asyncio.sleep(settings.backlog_interval)

    def _overload(self) -> GorgonError | None:
        settings = self.settings
        if self._in_flight >= settings.max_in_flight:
            message = f"{self._in_flight} requests are being admitted"
        elif (waiting := self._waiting + self._stored_since + self._in_flight) >= settings.max_waiting:
            message = f"{waiting} requests wait for a worker"
        else:
            return None
        return GorgonError(ErrorCode.OVERLOADED, message, retry_after=settings.retry_after)

    # ------------------------------------------------ the request door

    def _on_request(self, message: Message) -> None:
        if not self._can_answer(message):
            return
        began = asyncio.get_running_loop().time()
        size, most = len(message.data), self.settings.max_request_bytes
        if size > most:
            error = GorgonError(ErrorCode.PAYLOAD_TOO_LARGE, f"a request of {size} bytes: at most {most} are taken")
        elif (overload := self._overload()) is not None:
            error = overload
        else:
            self._begin()
            task = self.spawn(self._serve(message, began), "request")
            task.add_done_callback(self._end)
            return
        self._refuse(Refused(error, self._addressee(message)))
        self._answered(began, error)

    def _can_answer(self, message: Message) -> bool:
        """Nobody waits without a reply subject, and nobody may have us write into the pipeline's or the server's own subjects."""
        if message.reply and not message.reply.startswith((f"{subjects.ROOT}.", "$")):
            return True
        self._counts["dropped"] += 1
        to = self._addressee(message)
        self.log.warning("no_reply_subject", request_id=to.key, subject=message.subject, reply=message.reply)
        return False

    def _addressee(self, message: Message) -> Addressee:
        """Of a request that is refused unread; a long one is not decoded for its id."""
        tenant = self._tenant_of(message.subject)
        to = Addressee(ReplyTo(message.reply, encoding_of(message.data)), tenant=tenant or DEFAULT_TENANT)
        if len(message.data) <= self.settings.inline_bytes:
            try:
                return addressee_of(decode_body(message.data)[0], to, tenant)
            except GorgonError:
                pass
        return to

    @staticmethod
    def _tenant_of(subject: str) -> str | None:
        """Whose door it is (of generate or jobs, of whatever model); None for everybody's."""
        tokens = subject.split(".")
        return tokens[4] if len(tokens) > 4 else None

    def _answered(self, began: float, error: GorgonError | None = None) -> None:
        seconds = asyncio.get_running_loop().time() - began
        self._generate.done(seconds, "" if error is None else f"{error.code}:{error.message}")
        if error is None:
            self._admission_seconds.observe(seconds)

    async def _serve(self, message: Message, began: float) -> None:
        outcome = await self._admit(message.data, message.reply, self._tenant_of(message.subject))
        outcome, span = self._traced(outcome, began)
        if isinstance(outcome, Admitted):
            try:
                await self._put(outcome)
            except GorgonError as error:
                outcome = Refused(error, outcome.to)
            else:
                self._send(outcome.to, self._accepted_event(outcome))
                self._answered(began)
                span.end()
                return
        self._refuse(outcome)
        self._answered(began, outcome.error)
        span.end(error=f"{outcome.error.code}: {outcome.error.message}")

    def _traced(self, outcome: Admitted | Refused, began: float) -> tuple[Admitted | Refused, Span]:
        """The request's first span, and the request with its trace: a new one if the client has none."""
        to = outcome.to
        span = self.tracer.begin("tokenize", to.trace, wall_clock(began), request_id=to.key)
        trace = span.traceparent or str(generate_trace())
        if to.key is not None:
            note_request(to.key, trace=trace)
        if isinstance(outcome, Admitted):
            span.set(prompt_tokens=outcome.prompt_tokens, durable=outcome.request.durable)
            outcome = outcome._replace(request=outcome.request._replace(trace=trace))
        return outcome, span

    async def _put(self, admitted: Admitted) -> None:
        """Raises GorgonError."""
        try:
            is_new = await self._store.put(admitted.request)
        except GorgonError:
            raise
        except Exception as error:  # harms this request only
            self.log.error("put_failed", request_id=admitted.request.key, exc_info=error)
            raise GorgonError(ErrorCode.INTERNAL, "the request could not be stored") from None
        self._counts["accepted" if is_new else "repeated"] += 1
        self._encode_seconds.observe(admitted.request.tokenize_ms / 1e3)
        if is_new:
            self.meter.count("gorgon_tokenizer_prompt_tokens_total", by=admitted.prompt_tokens)
        self._stored_since += is_new
        self.log.info(
            "accepted" if is_new else "repeated",
            request_id=admitted.request.key,
            prompt_tokens=admitted.prompt_tokens,
            tokenize_ms=round(admitted.request.tokenize_ms, 2),
        )

    async def _admit(self, data: bytes, reply: str, tenant: str | None, job: str | None = None) -> Admitted | Refused:
        admit = partial(self._admission.admit, data, reply, self._context, tenant=tenant, job_id=job)
        if len(data) <= self.settings.inline_bytes:
            outcome = admit()
        else:
            outcome = await asyncio.get_running_loop().run_in_executor(self._threads, admit)
        if isinstance(outcome, Admitted) and (
            stage := self._registry.unable(outcome.request, asyncio.get_running_loop().time())
        ):
            message = f"a {stage} of an older version does not know all fields of this request yet"
            error = GorgonError(ErrorCode.UNAVAILABLE, message, retry_after=self.settings.retry_after)
            return Refused(error, outcome.to)
        if isinstance(outcome, Admitted) and outcome.request.constraint:
            assert self._constraints is not None
            try:
                await self._constraints.check(outcome.request.constraint, outcome.constrained_by, outcome.to.tenant)
            except GorgonError as error:
                return Refused(error, outcome.to)
        return outcome

    def _begin(self) -> None:
        self._in_flight += 1
        self._idle.clear()

    def _end(self, _: object = None) -> None:
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()

    def _accepted_event(self, admitted: Admitted) -> dict[str, Any]:
        key, to = admitted.request.key, admitted.to
        assert to.id is not None
        return accepted_event(
            to.id,
            to.tenant,
            prompt_tokens=admitted.prompt_tokens,
            seed=admitted.request.sampling.seed,
            replay=subjects.replay(self.settings.model, subjects.partition_of(key, self.settings.partitions)),
            results=subjects.results(key) if admitted.request.durable else None,
            tool_format=admitted.request.tool_format,
        )

    def _refuse(self, refused: Refused) -> None:
        self._note_refusal(refused)
        self._send(
            refused.to, error_event(refused.to.id, refused.error, metadata=refused.to.metadata) | {"refused": True}
        )

    def _note_refusal(self, refused: Refused) -> None:
        error, to = refused.error, refused.to
        self._counts[f"refused_{error.code}"] += 1
        self.log.info("refused", request_id=to.key, code=str(error.code), message=error.message)

    def _send(self, to: Addressee, event: dict[str, Any]) -> None:
        for data in encode_for(to.reply, [event]):
            self.bus.publish(to.reply.subject, data)

    # ------------------------------------------------ what tokens stand for

    def _on_pieces(self, message: Message) -> None:
        if not message.reply:
            return
        try:
            query = codec.decode_as(PiecesQuery, message.data)
        except codec.CodecError as error:
            self.log.error("pieces_query_unreadable", error=str(error))
            return
        ids = codec.unpack_ids(query.ids)
        special = codec.pack_ids(self._pieces.special.intersection(ids))
        reply = PiecesReply(tuple(self._pieces[token] for token in ids), special=special)
        self.bus.publish(message.reply, codec.encode(reply))

    # ------------------------------------------------ models that nobody serves

    def _on_any_request(self, message: Message) -> None:
        """One tokenizer, of whatever model, gets each request a second time: to say so if nobody serves its model."""
        model = message.subject.split(".")[3]
        loop = asyncio.get_running_loop()
        if model == self.settings.model or self._presence(model) is Presence.SERVED:
            return
        if self._can_answer(message):
            grace = self._listening_since + self.settings.registry_grace - loop.time()
            loop.call_later(
                max(grace, self.settings.unknown_model_delay), self._refuse_model, model, self._addressee(message)
            )

    def _presence(self, model: str) -> Presence:
        return self._registry.presence(model, asyncio.get_running_loop().time())

    def _refuse_model(self, model: str, to: Addressee) -> None:
        presence = self._presence(model)
        if presence is Presence.SERVED:
            return
        # After a reconnect silence proves nothing yet.
        heard = self.bus.connected_for >= self.settings.registry_grace
        if presence is Presence.UNKNOWN and heard:
            error = GorgonError(ErrorCode.UNKNOWN_MODEL, f"nobody serves a model {model!r}")
        else:
            message = f"no tokenizer of model {model!r} is there at the moment"
            error = GorgonError(ErrorCode.UNAVAILABLE, message, retry_after=self.settings.retry_after)
        self._refuse(Refused(error, to))

    # ------------------------------------------------ the durable door

    async def _on_job(self, delivery: Delivery) -> None:
        self._begin()
        try:
            await self._take_job(delivery)
        except BusError as error:
            self.log.warning("job_delayed", job=delivery.message.seq, error=repr(error))
            await delivery.nak(self.settings.retry_after)
        finally:
            self._end()

    async def _take_job(self, delivery: Delivery) -> None:
        """Every step may be repeated, so the job is acked last."""
        seq, data = delivery.message.seq, delivery.message.data
        began = asyncio.get_running_loop().time()
        tenant = self._tenant_of(delivery.message.subject)
        outcome, span = self._traced(await self._admit(data, "", tenant, job_id(seq)), began)
        accepted_seq = 0
        if isinstance(outcome, Admitted):
            accepted_seq = await self._job_results.store_accepted(outcome, self._accepted_event(outcome), seq)
            try:
                if not accepted_seq:
                    # The id has results: of this job, which comes again, or of an earlier one, which may be another.
                    outcome = outcome._replace(request=outcome.request._replace(refused_as=job_id(seq)))
                    await self._store.check_id(outcome.request)
                await self._put(outcome)
            except GorgonError as error:
                if error.retryable:
                    raise BusError(error.message) from None
                outcome = Refused(error, outcome.to)
        if isinstance(outcome, Refused):
            if outcome.error.retryable:
                raise BusError(outcome.error.message)
            self._note_refusal(outcome)
            await self._job_results.store_refusal(outcome, seq, accepted_seq)
        await delivery.ack()
        span.end(error=f"{outcome.error.code}: {outcome.error.message}" if isinstance(outcome, Refused) else "")
