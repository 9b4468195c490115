"""The I/O side of a model worker: takes orders from schedulers, feeds the engine, and appends what it generates to the token log.

The engine never waits for anything here. What it generates goes into an outbox that sends again until NATS has stored it; while the
outbox is full the engine pauses, so nothing is dropped and memory stays bounded. A request counts as running, and is reported so in
every heartbeat, until its finish is stored: a scheduler that no longer hears of a request knows that it must be continued elsewhere.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from services.model_worker.engine_api import Engine, OnFatal, OnSteps
from services.model_worker.interface import (
    PROMPT,
    EngineOverloaded,
    EngineRequest,
    EngineStats,
    FinishReason,
    RequestError,
    RequestRejected,
    RequestSpeculation,
    StepOutput,
    TokenOutput,
)
from services.model_worker.log_entries import ActiveRun, Batch, SteadyEntries
from services.model_worker.settings import WorkerSettings
from shared import codec, subjects
from shared import messages as m
from shared.bus import Bus, Message
from shared.errors import ErrorCode
from shared.logging import note_request
from shared.outbox import Outbox
from shared.service import Service
from shared.tracing import SpanEvent, wall_clock

# A stage must be gone within a second of SIGTERM; what the log has not taken by then is generated again elsewhere.
FLUSH_TIMEOUT = 0.7
# Seconds for which a run's end is remembered. An order that comes later is run in vain: the fold drops what it gives.
REMEMBER_ENDED = 120.0
# Seconds after which the log is told of a run: at first the engine's thread wants the interpreter, and the client its first token.
TOLD_AFTER = 0.001
# The worker gives itself up when a step has taken this many times its bound.
STALL_FACTOR = 3.0

MakeEngine = Callable[[WorkerSettings, OnSteps, OnFatal], Engine]


class EngineDied(RuntimeError):
    """The engine cannot go on: the process must be started anew."""


class EndedRuns:
    """Remembers, for REMEMBER_ENDED seconds and the latest `limit` requests that ended here, the highest epoch and whether it was run
    to its end."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._runs: OrderedDict[str, tuple[int, bool, float]] = OrderedDict()  # oldest end first

    def add(self, key: str, epoch: int, completed: bool, now: float) -> None:
        runs = self._runs
        if epoch >= self.epoch(key):
            runs[key] = (epoch, completed, now)
            runs.move_to_end(key)
        while len(runs) > self._limit:
            runs.popitem(last=False)
        self.forget(now)

    def forget(self, now: float) -> None:
        """What ended too long ago: whoever has its id now is another request."""
        runs = self._runs
        while runs and now - next(iter(runs.values()))[2] > REMEMBER_ENDED:
            runs.popitem(last=False)

    def epoch(self, key: str) -> int:
        return self._runs[key][0] if key in self._runs else 0

    def completed(self, key: str, epoch: int) -> bool:
        return key in self._runs and self._runs[key][:2] == (epoch, True)


class StallWatch:
    """How long the engine has been seen in one and the same step. Only time in which this process itself ran counts: after a
    SIGSTOP the step's age is large and proves nothing."""

    def __init__(self) -> None:
        self._step: tuple[int, float] | None = None
        self._seen = 0.0
        self._last = 0.0

    def observe(self, now: float, stats: EngineStats, longest_gap: float) -> float:
        step = None if stats.step_started is None else (stats.step, stats.step_started)
        if step is None or step != self._step:
            self._seen = 0.0
        else:
            self._seen += min(now - self._last, longest_gap)
        self._step, self._last = step, now
        return self._seen


class WorkerService(Service):
    stage = "model_worker"
    settings: WorkerSettings

    def __init__(self, bus: Bus, settings: WorkerSettings, make_engine: MakeEngine) -> None:
        super().__init__(bus, settings)
        self.engine = make_engine(settings, self._on_steps, self._on_fatal)
        self.outbox = Outbox(bus, limit=settings.outbox_limit, on_full=self._pause)
        self._runs: dict[str, ActiveRun] = {}
        self._steady = SteadyEntries(self._run_of)
        self._ended = EndedRuns(settings.remember_ended)
        self._lately: dict[
            str, tuple[int, int]
        ] = {}  # epochs of completed runs, and the beat that reports them for the last time
        self._loaded = False
        self._loading = ("starting", 0.0)
        self._paused = False
        self._suspects: tuple[str, ...] = ()
        self._stall = StallWatch()
        self._stats: EngineStats | None = None  # of the last heartbeat
        self._step_seconds = self.meter.histogram("gorgon_worker_step_seconds")
        self._step_sequences = self.meter.histogram("gorgon_worker_step_sequences")
        self._queue_seconds = self.meter.histogram("gorgon_worker_queue_seconds")
        self._prefill_seconds = self.meter.histogram("gorgon_worker_prefill_seconds")

    # ------------------------------------------------ life

    async def on_start(self) -> None:
        beating = self.spawn(self._beat_forever(), "loading")
        try:
            await self.engine.load(self._on_progress)
        finally:
            beating.cancel()
        self._loaded = True
        self.outbox.start(self)
        await self.serve("run", subjects.worker_run(self.instance), self._on_run)
        await self.serve("abort", subjects.worker_abort(self.instance), self._on_abort)
        self.bus.on_reconnect(self.beat_now)
        self.spawn(self._watch_engine(), "watch")

    async def on_drain(self) -> None:
        """Hands everything over: stops at a step boundary, puts what was generated into the log, then reports to hold nothing."""
        await self.engine.stop()
        try:
            async with asyncio.timeout(FLUSH_TIMEOUT):
                await self.outbox.flush()
        except TimeoutError:
            self.log.warning("not_flushed", messages=len(self.outbox))
        for run in list(self._runs.values()):
            self.log.info("handed_over", request_id=run.key, epoch=run.epoch, generated=sum(run.lengths))
            self._end(run, completed=False)
        self.beat_now()

    async def on_stop(self) -> None:
        self.outbox.stop()
        await self.engine.stop()

    def _on_progress(self, what: str, fraction: float) -> None:
        self._loading = (what, fraction)
        self.log.info("loading", what=what, fraction=round(fraction, 3))

    # ------------------------------------------------ heartbeats

    def heartbeat(self) -> m.Heartbeat | m.WorkerHeartbeat:
        if not self._loaded:
            what, fraction = self._loading
            return self.base_heartbeat()._replace(detail={"loading": what, "load": round(fraction, 3)})
        stats, limits = self.engine.stats(), self.engine.limits
        self._stats = stats
        base = self.base_heartbeat(
            load=1 - stats.slots_free / stats.slots_total,
            in_flight=len(self._runs),
            batch=stats.batch_size,
            waiting=stats.waiting,
            tokens=stats.tokens_generated,
            prompt_tokens=stats.prompt_tokens,
            prefix_hits=stats.prefix_hit_tokens,
            preemptions=stats.preemptions,
            kv_blocks_free=stats.blocks_free,
            kv_blocks_total=stats.blocks_total,
            **_speculation_detail(stats),
            slots_free=stats.slots_free,
            outbox=len(self.outbox),
            paused=int(self._paused),
        )
        started = stats.step_started
        behind = () if started is None else tuple(run.key for run in self._runs.values() if run.taken > started)
        return m.WorkerHeartbeat(
            base,
            stats.step,
            0.0 if started is None else max(0.0, asyncio.get_running_loop().time() - started),
            stats.step_bound,
            self._reported(),
            limits.max_seqs,
            stats.blocks_total * limits.block_size,
            stats.blocks_free * limits.block_size,
            limits.max_model_len,
            limits.vocab_size,
            self._suspects,
            tuple(run.key for run in self._runs.values() if run.unproven),
            behind,
            tuple(run.key for run in self._runs.values() if run.cleared),
        )

    def refresh_meter(self) -> None:
        super().refresh_meter()
        meter = self.meter
        meter.set("gorgon_worker_outbox_retries_total", self.outbox.retries)
        if self._stats is not None and (speculation := self._stats.speculation) is not None:
            meter.set("gorgon_worker_drafted_total", speculation.drafted)
            for head, accepted in enumerate(speculation.accepted, 1):
                meter.set("gorgon_worker_accepted_tokens_total", accepted, str(head))
            for nodes, steps in speculation.steps.items():
                meter.set("gorgon_worker_tree_steps_total", steps, str(nodes))

    def _reported(self) -> dict[str, int]:
        """What is running, and what was between two heartbeats: a scheduler that has never heard of a run takes it for lost."""
        self._lately = {
            key: ended for key, ended in self._lately.items() if self._beat <= ended[1] and not self.draining
        }
        return {key: epoch for key, (epoch, _) in self._lately.items()} | {r.key: r.epoch for r in self._runs.values()}

    async def _watch_engine(self) -> None:
        """A step that never ends: other workers take its requests over at its bound; this process, some time after, starts anew."""
        loop = asyncio.get_running_loop()
        interval = self.settings.heartbeat_interval
        while True:
            await asyncio.sleep(interval)
            stats = self.engine.stats()
            if self._stall.observe(loop.time(), stats, 2 * interval) > STALL_FACTOR * stats.step_bound:
                raise EngineDied(f"step {stats.step} does not end: its bound was {stats.step_bound:.1f} s")

    # ------------------------------------------------ orders

    def _on_run(self, message: Message) -> str | None:
        try:
            reply = self._accept(codec.decode_as(m.Run, message.data))
        except codec.CodecError as error:
            self.log.error("bad_run", error=str(error))
            reply = m.RunReply(False, ErrorCode.INTERNAL.value, f"the worker cannot read the order: {error}")
        self.meter.count("gorgon_worker_runs_total", "accepted" if reply.accepted else reply.code)
        if message.reply:
            self.bus.publish(message.reply, codec.encode(reply))
        return None if reply.accepted else f"{reply.code}:{reply.message}"

    def _accept(self, run: m.Run) -> m.RunReply:
        if self.draining:
            return m.RunReply(False, "draining")
        self._ended.forget(asyncio.get_running_loop().time())
        present = self._runs.get(run.key)
        if (present is not None and present.epoch == run.epoch) or self._ended.completed(run.key, run.epoch):
            return m.RunReply(True)
        # An epoch that was aborted here stays so, even if its order comes (again) after the abort.
        if (present is not None and present.epoch > run.epoch) or self._ended.epoch(run.key) >= run.epoch:
            return m.RunReply(False, "stale_epoch")
        if present is not None:
            self.log.info("replaced", request_id=run.key, epoch=present.epoch, by=run.epoch)
            self.engine.abort(run.key, present.epoch)
            self._end(present, completed=False)
        if self._paused:
            return m.RunReply(False, ErrorCode.OVERLOADED.value, "the token log does not take messages")
        if run.isolated and (company := self._company()):
            return m.RunReply(False, ErrorCode.OVERLOADED.value, company, only_this=True)
        requests = self._engine_requests(run)
        # Not after `submit`, which may give the slots at once.
        taken = asyncio.get_running_loop().time()
        try:
            self.engine.submit(requests)
        except EngineOverloaded as error:
            return m.RunReply(False, ErrorCode.OVERLOADED.value, str(error))
        except RequestRejected as rejected:
            self.log.warning(
                "rejected", request_id=run.key, epoch=run.epoch, code=rejected.error.code, error=rejected.error.message
            )
            return m.RunReply(False, rejected.error.code, rejected.error.message)
        lengths = [0] * run.choices
        for request in requests:
            lengths[request.choice] = len(request.generated_ids)
        partition = subjects.partition_of(run.key, self.settings.partitions)
        choices = set(range(run.choices)).difference(run.done)
        unproven = set(choices) if run.isolated else set()
        prompt, prefix = len(run.prompt_ids) // 4, sum(lengths)
        self._runs[run.key] = ActiveRun(
            run.key, run.epoch, partition, lengths, choices, unproven, taken, prompt, prefix, run.trace
        )
        note_request(run.key, run.epoch, run.trace)
        told = partial(self.log.info, "run", request_id=run.key, epoch=run.epoch, prompt=prompt, prefix=prefix)
        asyncio.get_running_loop().call_later(TOLD_AFTER, told)
        return m.RunReply(True)

    def _company(self) -> str:
        """Who would keep a suspect from running apart, and take it along if it is poison; "" if nobody would."""
        # Two schedulers may send one each at the same moment. Whoever waits behind poison would die with it, again and again.
        if any(run.unproven for run in self._runs.values()):
            return "another suspect runs apart"
        # The first step of one that has just come from another worker may be under way already. Only who still waits for a slot will
        # be kept apart. (New requests come all the time: were they counted, a suspect might wait for ever.)
        newcomers = [run for run in self._runs.values() if run.epoch > 1 and not (run.admitted or run.first)]
        return "others take their first step" if len(newcomers) > self.engine.stats().waiting else ""

    def _engine_requests(self, run: m.Run) -> list[EngineRequest]:
        """A sequence for each choice that is not done yet. A beam search, which gives all choices out at once, begins anew."""
        prompt = codec.id_array(run.prompt_ids)
        choices = [choice for choice in range(run.choices) if choice not in run.done]
        # One of them tells of the prompt.
        wanted = run.sampling.prompt_logprobs is not None and run.prompt_done < len(prompt)
        deadline = None if run.deadline is None else asyncio.get_running_loop().time() + run.deadline
        beams = run.sampling.num_beams > 1
        return [
            EngineRequest(
                run.key,
                choice,
                run.epoch,
                prompt,
                run.sampling,
                codec.id_array(run.generated[choice]) if choice < len(run.generated) and not beams else (),
                run.priority,
                deadline,
                run.isolated,
                prompt_done=run.prompt_done if wanted and choice == choices[0] else None,
                choices=run.choices if beams else 1,
                constraint=run.constraint,
            )
            for choice in (choices[:1] if beams else choices)
        ]

    def _on_abort(self, message: Message) -> str | None:
        try:
            abort = codec.decode_as(m.Abort, message.data)
        except codec.CodecError as error:
            self.log.error("bad_abort", error=str(error))
            return f"{ErrorCode.INTERNAL.value}:{error}"
        run = self._runs.get(abort.key)
        if run is not None and run.epoch <= abort.epoch:
            self.log.info("aborted", request_id=run.key, epoch=run.epoch, generated=sum(run.lengths))
            self.engine.abort(run.key, abort.epoch)
            self._end(run, completed=False)
        self._ended.add(abort.key, abort.epoch, completed=False, now=asyncio.get_running_loop().time())
        return None

    def _end(self, run: ActiveRun, completed: bool) -> None:
        """The worker is through with a run, if it still is the one that it holds."""
        if self._runs.get(run.key) is run:
            del self._runs[run.key]
            self._steady.forget()
            self._trace(run, "" if completed else "not completed here")
            self._ended.add(run.key, run.epoch, completed, asyncio.get_running_loop().time())
            if completed:
                self._lately[run.key] = run.epoch, self._beat + 1

    def _trace(self, run: ActiveRun, error: str = "") -> None:
        if not self.tracer.enabled:
            return
        now = asyncio.get_running_loop().time()
        zero = wall_clock(0.0)
        taken, admitted, first, last = (zero + t if t else 0.0 for t in (run.taken, run.admitted, run.first, run.last))
        end = max(zero + now, admitted, first, last)
        events = [SpanEvent("resumed", taken, {"prefix_tokens": run.prefix})] if run.epoch > 1 else []
        span = self.tracer.record(
            "generate",
            run.trace,
            taken,
            end,
            events=events,
            error=error,
            request_id=run.key,
            epoch=run.epoch,
            prompt_tokens=run.prompt,
            prefix_tokens=run.prefix,
            generated_tokens=sum(run.lengths) - run.prefix,
        )
        phases = (("queue", taken, admitted), ("prefill", admitted, first), ("decode", first, last))
        for name, began, ended in phases:
            if began:
                self.tracer.record(name, span.traceparent, began, ended or end, request_id=run.key, epoch=run.epoch)

    # ------------------------------------------------ what the engine generates

    def _on_steps(self, steps: list[StepOutput]) -> None:
        batches: dict[int, Batch] = {}
        for step in steps:
            self._measure(step)
            for output in step.tokens:
                self._take(output, batches)
            if step.rows is not None and not self._steady.add(step.rows, batches):
                for output in step.rows:
                    self._take(output, batches)
            for error in step.errors:
                if (run := self._run_of(error)) is not None:
                    batch = batches.setdefault(run.partition, Batch())
                    batch.add(self._failed(run, error))
                    batch.finished.append(run)
        with self.bus.together():
            for partition, batch in batches.items():
                self._append(steps[-1].step, partition, batch)

    def _take(self, output: TokenOutput, batches: dict[int, Batch]) -> None:
        if output.finish is FinishReason.ABORTED or (run := self._run_of(output)) is None:
            return
        if not output.ids and output.finish is None:
            run.unproven.clear()  # a search that has survived a step
            return
        batch = batches.setdefault(run.partition, Batch())
        batch.add(self._entry(run, output))
        if run.unproven:
            batch.proven.append((run, output.choice))
            run.outputs[output.choice] += 1
        if not run.open:
            run.last = max(asyncio.get_running_loop().time(), run.first)
            batch.finished.append(run)

    def _measure(self, step: StepOutput) -> None:
        if step.seconds is not None:
            self._step_seconds.observe(step.seconds)
            self._step_sequences.observe(len(step.tokens) + len(step.rows or ()))
        for slot in step.admitted:
            run = self._runs.get(slot.request_id)
            if run is not None and run.epoch == slot.epoch and not run.admitted:
                run.admitted = slot.when
                # Computed elsewhere, the prompt of a request that has migrated was no hit.
                run.cached = 0 if run.prefix else min(slot.cached, run.prompt)
                self._queue_seconds.observe(max(0.0, slot.when - run.taken))

    def _run_of(self, output: TokenOutput | RequestError | EngineRequest) -> ActiveRun | None:
        """The run that an output belongs to; None if the run has been aborted or replaced, or if that choice has ended."""
        run = self._runs.get(output.request_id)
        if run is None or run.epoch != output.epoch:
            return None
        return run if output.choice in run.open or (output.choice == PROMPT and run.open) else None

    def _entry(self, run: ActiveRun, output: TokenOutput) -> m.Tokens:
        cached = 0
        if output.choice != PROMPT:
            if not run.first:
                cached = run.cached
                # The engine's clock is finer than uvloop's, which counts milliseconds: a slot may seem younger than its token.
                run.first = max(asyncio.get_running_loop().time(), run.admitted)
                if run.admitted:
                    self._prefill_seconds.observe(run.first - run.admitted)
            run.lengths[output.choice] = output.position + len(output.ids)
        failure = logprobs = None
        finish = output.finish
        if finish is not None:
            self.log.info(
                "finished",
                request_id=run.key,
                epoch=run.epoch,
                choice=output.choice,
                reason=finish.value,
                **_speculation_of(output.speculation),
            )
            run.open.discard(output.choice)
            self.meter.count("gorgon_worker_finished_total", finish.value)
            if finish is FinishReason.DEADLINE:
                failure = m.Failure(
                    ErrorCode.DEADLINE_EXCEEDED.value, "the deadline passed while the model was generating"
                )
                self._abort_rest(run)
        if output.logprobs is not None:
            logprobs = tuple(
                m.TokenLogprobs(p.chosen, codec.pack_ids(p.top_ids), tuple(p.top)) for p in output.logprobs
            )
        return m.Tokens(
            run.key,
            output.choice,
            run.epoch,
            output.position,
            codec.pack_ids(output.ids),
            None if finish is None else finish.value,
            output.stop_token,
            logprobs,
            failure,
            cached,
        )

    def _failed(self, run: ActiveRun, error: RequestError) -> m.Tokens:
        self.log.error(
            "failed", request_id=run.key, epoch=run.epoch, choice=error.choice, code=error.code, error=error.message
        )
        run.open.discard(error.choice)
        self.meter.count("gorgon_worker_finished_total", "error")
        self._abort_rest(run)
        failure = m.Failure(error.code, error.message)
        return m.Tokens(run.key, error.choice, run.epoch, run.lengths[error.choice], b"", "error", failure=failure)

    def _abort_rest(self, run: ActiveRun) -> None:
        """One choice failed, and with it the request: no use in going on with the others."""
        if run.open:
            run.open.clear()
            self._steady.forget()
            self.engine.abort(run.key, run.epoch)

    def _append(self, step: int, partition: int, batch: Batch) -> None:
        subject = subjects.tok(self.settings.model, partition)

        def stored() -> None:
            for run, choice in batch.proven:
                run.unproven.discard(choice)
            for run in batch.finished:
                self._end(run, completed=True)

        *parts, last = (
            codec.encode(m.StepTokens(self.instance, step, cast(tuple[m.Tokens, ...], part)))
            for part in batch.messages()
        )
        for part in parts:
            self.outbox.put(subject, part)
        self.outbox.put(subject, last, stored if batch.finished or batch.proven else None)

    def _pause(self, full: bool) -> None:
        self._paused = full
        self.engine.pause(full)
        self.log.warning("paused" if full else "resumed", outbox=len(self.outbox))

    def _on_fatal(self, error: BaseException, suspects: Sequence[str]) -> None:
        """Tells who took part in the step that killed the engine, as the last thing that this worker says."""
        self.log.critical("engine_died", error=repr(error), suspects=list(suspects), exc_info=error)
        self._suspects = tuple(suspects)
        for run in self._runs.values():
            self._trace(run, repr(error))
        self.draining = True
        self.beat_now()
        self.fail(EngineDied(repr(error)))


def _speculation_detail(stats: EngineStats) -> dict[str, float]:
    """For the heartbeat: tokens of a sequence's step with guesses, and the share of steps without any."""
    speculation = stats.speculation
    if speculation is None:
        return {}
    plain = speculation.steps.get(1, 0) / max(1, sum(speculation.steps.values()))
    return {"tokens_per_step": round(speculation.tokens_per_step, 3), "plain_steps": round(plain, 3)}


def _speculation_of(speculation: RequestSpeculation | None) -> dict[str, Any]:
    """For the log, of one sequence; nothing if there was nothing to guess."""
    if speculation is None or not speculation.drafted:
        return {}
    return dict(
        tokens_per_step=round(speculation.tokens_per_step, 3),
        accepted_by_head=list(speculation.accepted),
        mean_tree=round(speculation.nodes / speculation.drafted, 1),
        plain_steps=round(speculation.plain / (speculation.plain + speculation.drafted), 3),
    )
