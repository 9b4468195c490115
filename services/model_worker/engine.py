"""The engine: sequences in, tokens out, on a thread of its own. Knows nothing of NATS.

Overlap: step N+1 is planned and launched while the device still works on step N; only then is N read back. What N's tokens decide
(an end-of-sequence id) is therefore acted upon one step late, and what was computed for nothing is discarded.

Where sequences follow grammars, N's tokens also decide what N+1 may choose. Such a step is launched in two halves: its forward pass,
then, while that runs, N is read back and the masks are made, then the choice of tokens.
"""

from __future__ import annotations

import gc
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.model_worker.batch_scheduler import BatchScheduler
from services.model_worker.constraints import Constraints
from services.model_worker.engine_setup import EngineConfig, ModelInfo, build
from services.model_worker.interface import (
    PROMPT,
    EngineOverloaded,
    EngineRequest,
    EngineStats,
    FinishReason,
    RequestError,
    RequestRejected,
    SlotGiven,
    StepOutput,
    TokenLogprobs,
    TokenOutput,
)
from services.model_worker.loader import Progress
from services.model_worker.logit_edits import edit_row, edited_ids
from services.model_worker.model_runner import STEPS_IN_FLIGHT, ModelRunner
from services.model_worker.models.config import ModelError, load_config
from services.model_worker.readback import Ticket
from services.model_worker.sampler import SamplingMode
from services.model_worker.search.admission import Refusal, refusal
from services.model_worker.search.strategy import Strategy
from services.model_worker.sequence import Sequence
from services.model_worker.speculation.controller import NOBODY, TreeController
from services.model_worker.speculation.tree import Tree
from services.model_worker.step_bound import StepBound
from services.model_worker.step_plan import StepPlan
from services.model_worker.step_state import field_row
from services.model_worker.token_masks import TokenMasks
from shared.errors import ErrorCode
from shared.sampling import MAX_LOGPROBS
from shared.structured import ConstraintError, Matcher

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineOverloaded",
    "EngineRequest",
    "EngineStats",
    "FinishReason",
    "ModelError",
    "ModelInfo",
    "RequestError",
    "RequestRejected",
    "StepOutput",
    "TokenLogprobs",
    "TokenOutput",
]

Suspects = list[tuple[str, int]]
Key = tuple[str, int]  # (request id, choice)


@dataclass(frozen=True, slots=True)
class _Submission:
    request: EngineRequest
    device_row: Any
    edit_row: Any
    sampling_mode: SamplingMode
    matcher: Matcher | ConstraintError | None = None


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str
    epoch: int

    def covers(self, request: EngineRequest) -> bool:
        return request.request_id == self.request_id and request.epoch <= self.epoch


@dataclass(slots=True)
class _InFlight:
    """ticket: None while the choice of its tokens has not been launched."""

    plan: StepPlan
    ticket: Ticket | None
    launched: float
    prompt_rows: int
    bound: float


class Engine:
    """load, start, then submit; `on_step` and `on_fatal` are called on the engine's thread and must only hand over.

    on_fatal(error, suspects): a step failed as a whole and the engine has stopped; suspects are the (request id, epoch) pairs that
    took part in the steps in flight. Everything that it held is lost.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_step: Callable[[StepOutput], None],
        on_fatal: Callable[[BaseException, Suspects], None] | None = None,
    ) -> None:
        self.config = config
        self._on_step = on_step
        self._on_fatal = on_fatal
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self.info: ModelInfo
        self.scheduler: BatchScheduler
        self.runner: ModelRunner
        self.trees: TreeController | None = None  # without a drafter
        self.constraints: Constraints
        self.masks: TokenMasks
        self._lock = threading.Lock()  # of the next four
        self._inbox: deque[_Submission | _Abort] = deque()
        self._preparing: dict[Key, _Submission] = {}  # their grammars are being compiled
        self._held: dict[Key, int] = {}  # the epoch of every sequence that has not ended
        self._accepting = False
        self._paused = False
        self._stopping = self._draining = False
        # From here on, the engine's thread alone writes.
        self._sequences: dict[Key, Sequence] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._launching: StepPlan | None = None
        self._bound = StepBound(config.min_step_bound, config.first_step_bound)
        self._last_retired = 0.0
        self._tokens_generated = 0

    def load(self, progress: Progress | None = None) -> None:
        """Reads the model, sizes the cache, compiles and captures. Raises ModelError; blocks for seconds to minutes."""
        with ThreadPoolExecutor(1, "vocabulary") as beside:  # most of a second for a large one, while weights are read
            constraints = beside.submit(self._load_constraints)
            parts = build(self.config, progress or (lambda fraction, text: None))
            self.info, self.scheduler, self.runner, self.trees = parts
            self.constraints = constraints.result()
        self.masks = self.runner.token_masks(self.constraints.special_ids)
        if self.constraints.available:
            with self.runner.context():
                self.masks.warm_up(self.runner.ops, self.runner.decoder.weights.embedding.dtype)
        overlap = self.info.device.startswith("cuda") if self.config.overlap is None else self.config.overlap
        self._depth = STEPS_IN_FLIGHT - 1 if overlap else 0

    def _load_constraints(self) -> Constraints:
        model = load_config(self.config.model)
        return Constraints.load(self.config.model, model.vocab_size, model.eos_ids)

    def start(self) -> None:
        # What loading left behind is never garbage: looking through it again and again would cost a step 50 ms at times.
        gc.collect()
        gc.freeze()
        self._accepting = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self, drain: bool = False, timeout: float | None = None) -> None:
        """Refuses new sequences; with `drain` finishes those held, otherwise drops them without a word. Waits for the thread."""
        with self._lock:
            self._accepting = False
        self._draining = drain
        self._stopping = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
            gc.unfreeze()  # an engine and its owner that refer to each other would hold the device's memory for ever

    # ---- from any thread

    def submit(self, *requests: EngineRequest) -> None:
        """Takes all of these sequences or none. Raises EngineOverloaded (try elsewhere) or RequestRejected (it can never run here);
        otherwise each will end in exactly one TokenOutput with a finish, unless the engine is stopped or fails as a whole.

        A sequence that is held already with a lower epoch is aborted and replaced.
        """
        submissions = [self._checked(request) for request in requests]
        keys = [(request.request_id, request.choice) for request in requests]
        with self._lock:
            if not self._accepting:
                raise EngineOverloaded("the engine is not running or is draining")
            held = [self._held.get(key) for key in keys]
            for request, epoch in zip(requests, held, strict=True):
                if epoch is not None and epoch >= request.epoch:
                    raise _rejected(request, "duplicate_request", f"is held already, with epoch {epoch}")
            if len(self._held) + held.count(None) > self.config.max_seqs + self.config.max_waiting:
                raise EngineOverloaded(f"{len(self._held)} sequences are held already")
            for (request_id, _), epoch in zip(keys, held, strict=True):
                if epoch is not None:
                    self._inbox.append(_Abort(request_id, epoch))
            self._held.update((key, request.epoch) for key, request in zip(keys, requests, strict=True))
            constrained = [submission for submission in submissions if submission.request.constraint]
            self._preparing.update(((s.request.request_id, s.request.choice), s) for s in constrained)
            self._inbox.extend(submission for submission in submissions if not submission.request.constraint)
        for submission in constrained:
            self.constraints.prepare(submission.request, partial(self._prepared, submission))
        self._wake.set()

    def _prepared(self, submission: _Submission, matcher: Matcher | ConstraintError) -> None:
        key = (submission.request.request_id, submission.request.choice)
        with self._lock:
            if self._preparing.get(key) is not submission:
                return  # aborted or replaced meanwhile
            if any(isinstance(item, _Abort) and item.covers(submission.request) for item in self._inbox):
                return  # the abort, which is before it in the inbox, has to find it here
            del self._preparing[key]
            self._inbox.append(replace(submission, matcher=matcher))
        self._wake.set()

    def abort(self, request_id: str, epoch: int) -> None:
        """Ends all choices of the request whose epoch is at most `epoch`. Harmless if there are none."""
        with self._lock:
            self._inbox.append(_Abort(request_id, epoch))
        self._wake.set()

    def pause_output(self, paused: bool) -> None:
        """While paused no step is launched. Those in flight still come out: at most two StepOutputs."""
        self._paused = paused
        self._wake.set()

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        in_flight = list(self._in_flight)
        with self._lock:
            running: dict[str, int] = {}
            for (request_id, _), epoch in self._held.items():
                running[request_id] = max(epoch, running.get(request_id, epoch))
            waiting = scheduler.waiting + sum(isinstance(item, _Submission) for item in self._inbox)
            waiting += len(self._preparing)
        return EngineStats(
            step=scheduler.steps,
            step_started=max(in_flight[0].launched, self._last_retired) if in_flight else None,
            step_bound=in_flight[0].bound if in_flight else self.config.min_step_bound,
            running=running,
            waiting=waiting,
            batch_size=len(scheduler.running),
            blocks_free=scheduler.pool.free,
            blocks_total=scheduler.pool.num_blocks,
            slots_free=scheduler.free_slots,
            slots_total=scheduler.limits.max_seqs,
            prompt_tokens=scheduler.prompt_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            preemptions=scheduler.preemptions,
            tokens_generated=self._tokens_generated,
            speculation=None if self.trees is None else self.trees.stats(),
        )

    def check_idle(self) -> list[str]:
        """Invariant: when nothing is held, every block and slot is back. Returns complaints; meaningless while something runs."""
        with self._lock:
            complaints = [f"{len(self._held)} sequences are held"] if self._held else []
            complaints += [f"{len(self._preparing)} grammars are being compiled"] if self._preparing else []
        if self._sequences or self._in_flight:
            complaints.append(f"{len(self._sequences)} sequences, {len(self._in_flight)} steps in flight")
        return complaints + self.scheduler.check_idle()

    def _checked(self, request: EngineRequest) -> _Submission:
        """All that can be wrong with one request is found here, before it meets others in a batch."""
        params, longest = request.params, self.info.max_model_len
        if not len(request.prompt_ids):
            raise _rejected(request, "invalid_request", "the prompt is empty")
        if len(request.prompt_ids) + min(params.max_tokens, 1) > longest:
            message = (
                f"the prompt has {len(request.prompt_ids)} tokens, the context holds {longest} and one must be left"
            )
            raise _rejected(request, "context_length_exceeded", message)
        try:
            parts = (request.prompt_ids, request.generated_ids, edited_ids(params), params.stop_token_ids)
            ids = np.concatenate([np.asarray(part, np.int64) for part in parts])
            device_row = field_row(params, request.choice, len(request.prompt_ids))
            mode = SamplingMode.of(params)
            changed = edit_row(params, self.info.eos_ids)
        except (TypeError, ValueError, OverflowError) as error:
            raise _rejected(request, "invalid_request", str(error)) from None
        # An id outside the embedding, or the logits, would take the whole device process down.
        if ids.min() < 0 or ids.max() >= self.info.vocab_size:
            raise _rejected(request, "invalid_request", f"token ids must be in 0 … {self.info.vocab_size - 1}")
        most = min(MAX_LOGPROBS, self.info.vocab_size)
        if params.max_tokens < 0 or not (-1 <= mode.logprobs <= most and 0 <= (params.prompt_logprobs or 0) <= most):
            raise _rejected(request, "invalid_request", "max_tokens, logprobs or prompt_logprobs is out of range")
        if (why := self._refusal(request)) is not None:
            raise _rejected(request, *why)
        if request.constraint and not self.constraints.available:
            raise _rejected(
                request, ErrorCode.UNSUPPORTED, "the model's folder has no tokenizer.json that one can constrain by"
            )
        if request.constraint and Strategy.of(params) is not Strategy.SAMPLING:
            raise _rejected(request, ErrorCode.UNSUPPORTED, "only sampling and greedy decoding follow a constraint")
        if request.constraint and params.ignore_eos:
            raise _rejected(
                request, "invalid_request", "a constraint says where the text ends: ignore_eos contradicts it"
            )
        return _Submission(request, device_row, changed, mode)

    def _refusal(self, request: EngineRequest) -> Refusal | None:
        info = self.info
        if Strategy.of(request.params) is Strategy.SAMPLING:
            return None
        return refusal(
            Sequence(request, 0, info.eos_ids, info.max_model_len),
            max_seqs=self.config.max_seqs,
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            vocab_size=info.vocab_size,
            amateur=info.amateur,
            memory_tokens=info.memory_tokens,
        )

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            with self.runner.context():
                while not self._stopping or (self._draining and self._held):
                    self._turn()
                self._drop_all()
        except BaseException as error:
            with self._lock:
                self._accepting = False
            plans = [flight.plan for flight in self._in_flight]
            plans += [self._launching] if self._launching is not None else []
            suspects = {(s.request.request_id, s.request.epoch) for plan in plans for s in plan.participants}
            if self._on_fatal is None:
                raise
            self._on_fatal(error, sorted(suspects))
        finally:
            self.constraints.close()
            self.masks.close()

    def _turn(self) -> None:
        """Takes what came in, launches a step if there is one, reads a step back if it is time."""
        output = StepOutput(self.scheduler.steps)
        self._take_inbox(output)
        for sequence in self.scheduler.expired(time.monotonic()):
            self._end(sequence, FinishReason.DEADLINE, output)
        plan = None if self._paused else self.scheduler.schedule(self._pick_tree)
        if plan is not None:
            self._launch(plan, output)
        idle = plan is None and not self._in_flight
        if len(self._in_flight) > (self._depth if plan is not None else 0):
            self._retire(output)
        if output.tokens or output.errors or output.seconds is not None:
            self._on_step(output)
        if idle:
            self._sleep()

    def _sleep(self) -> None:
        deadline = self.scheduler.next_deadline
        self._wake.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        # Cleared before the inbox is looked at: what comes after sets it again.
        self._wake.clear()

    def _take_inbox(self, output: StepOutput) -> None:
        while self._inbox:
            with self._lock:
                item = self._inbox.popleft()
            if isinstance(item, _Abort):
                self._take_abort(item, output)
            else:
                self._take_submission(item, output)

    def _take_submission(self, item: _Submission, output: StepOutput) -> None:
        request = item.request
        if isinstance(item.matcher, ConstraintError):
            self._release_key(request)
            output.errors.append(_constraint_failed(request, str(item.matcher)))
            return
        try:
            sequence = self.scheduler.add(request)
        except Exception as error:
            self._release_key(request)
            message = f"{type(error).__name__}: {error}"
            output.errors.append(
                RequestError(
                    request.request_id, request.choice, request.epoch, ErrorCode.INTERNAL, message, retryable=True
                )
            )
            return
        sequence.device_row, sequence.edit_row, sequence.sampling_mode = (
            item.device_row,
            item.edit_row,
            item.sampling_mode,
        )
        sequence.matcher = item.matcher
        if self.trees is not None:
            able = not (item.sampling_mode.penalties or item.sampling_mode.recent)
            sequence.record = self.trees.requests.admit(able)
        self._sequences[request.request_id, request.choice] = sequence
        # A migrated sequence may have generated all it will before its old worker died, and some are to generate nothing.
        if not sequence.reports and (reason := sequence.finish_reason()) is not None:
            self._end(sequence, reason, output)

    def _take_abort(self, item: _Abort, output: StepOutput) -> None:
        for sequence in list(self._sequences.values()):
            if item.covers(sequence.request):
                self._end(sequence, FinishReason.ABORTED, output)
        with self._lock:
            early = [submission for submission in self._preparing.values() if item.covers(submission.request)]
            for submission in early:
                del self._preparing[item.request_id, submission.request.choice]
        for request in (submission.request for submission in early):
            self._release_key(request)
            position, reason = len(request.generated_ids), FinishReason.ABORTED
            output.tokens.append(
                TokenOutput(request.request_id, request.choice, request.epoch, position, [], finish=reason)
            )

    def _end(self, sequence: Sequence, reason: FinishReason, output: StepOutput) -> None:
        """Ends a sequence without a new token."""
        self.scheduler.finish(sequence)
        request = sequence.request
        output.tokens.append(
            TokenOutput(request.request_id, request.choice, request.epoch, sequence.num_generated, [], finish=reason)
        )
        self._forget(request)

    def _forget(self, request: EngineRequest) -> None:
        sequence = self._sequences.pop(_key(request))
        if self.trees is not None:
            self.trees.requests.release(sequence.record)
            sequence.record = NOBODY  # a step in flight may still tell of it
            for flight in self._in_flight:
                if flight.plan.steady is not None:
                    flight.plan.steady.records = None
        self._release_key(request)

    def _release_key(self, request: EngineRequest) -> None:
        key = (request.request_id, request.choice)
        with self._lock:
            if self._held.get(key) == request.epoch:  # not replaced by a newer epoch
                del self._held[key]

    def _pick_tree(self, sequences: list[Sequence]) -> Tree | None:
        return None if self.trees is None else self.trees.pick(len(sequences), partial(_records, sequences))

    @staticmethod
    def _records_of(plan: StepPlan) -> NDArray[np.int64]:
        if plan.steady is None:
            return _records(plan.decodes)
        if plan.steady.records is None:
            plan.steady.records = _records(plan.steady.sequences)
        if plan.num_steady == len(plan.decodes):
            return plan.steady.records
        return np.concatenate((plan.steady.records, _records(plan.decodes[plan.num_steady :])))

    def _launch(self, plan: StepPlan, output: StepOutput) -> None:
        self._launching = plan
        launched = time.monotonic()
        prompt_rows = sum(chunk.rows for chunk in (*plan.chunks, *plan.contrasted_chunks))
        forward = self.runner.forward(plan)
        flight = _InFlight(plan, None, launched, prompt_rows, self._bound.declare(prompt_rows))
        self._in_flight.append(flight)
        self._launching = None
        constrained = [sequence for sequence in plan.unsteady if sequence.matcher is not None]
        if not constrained:
            flight.ticket = self.runner.choose(forward, None)
            return
        while len(self._in_flight) > 1:
            self._retire(output)  # the matchers go on by what it chose
        guesses = None if forward.guesses is None else forward.guesses.result()
        flight.ticket = self.runner.choose(forward, self.masks.fill(plan, guesses))
        self._end_broken(constrained, output)

    def _end_broken(self, sequences: list[Sequence], output: StepOutput, banned: str = "") -> None:
        """A matcher that cannot go on ends its own sequence, and no other. banned: why, if the request bans tokens."""
        for sequence in sequences:
            request, matcher = sequence.request, sequence.matcher
            if matcher is not None and matcher.error and self._sequences.get(_key(request)) is sequence:
                self.scheduler.finish(sequence)
                self._forget(request)
                message = banned if banned and request.params.has_edits else matcher.error
                output.errors.append(_constraint_failed(request, message))

    def _retire(self, output: StepOutput) -> None:
        flight = self._in_flight[0]
        assert flight.ticket is not None
        result = flight.ticket.result()
        now = time.monotonic()
        plan, seconds = flight.plan, now - max(flight.launched, self._last_retired)
        self._bound.observe(flight.prompt_rows, seconds)
        self._last_retired = now
        output.step, output.seconds = plan.step, seconds
        if plan.admitted:
            output.admitted = [
                SlotGiven(*_key(s.request), s.request.epoch, flight.launched, s.cached) for s in plan.admitted
            ]
        if self.trees is not None and plan.decodes:
            accepted = None if plan.tree is None else (result.decoded >= 0).sum(axis=1) - 1
            self.trees.observe(self._records_of(plan), accepted, plan.tree)
            self.trees.observe_time(len(plan.decodes), plan.tree, None if plan.chunks or plan.has_search else seconds)
        tokens, rows = self.scheduler.retire(
            plan, result.decoded, result.ids, result.logprobs, result.reports, result.candidates
        )
        self._in_flight.popleft()
        self._tokens_generated += sum(len(token.ids) for token in tokens if token.choice != PROMPT)
        if output.rows is not None:  # of a step before, retired in the same turn
            output.tokens += output.rows
        output.rows = rows
        if rows is not None:
            self._tokens_generated += sum(map(len, rows.ids))
        output.tokens += tokens
        for token in tokens:
            # Of the choices of a beam search only one stands for the sequence.
            sequence = self._sequences.get((token.request_id, token.choice))
            if token.finish is not None and sequence is not None:
                token.speculation = None if self.trees is None else self.trees.requests.summary(sequence.record)
                self._forget(sequence.request)
        # A token that its mask forbids is chosen only where every other one is forbidden, too.
        self._end_broken(plan.unsteady, output, "bad_words or min_tokens forbid all that the grammar allows")

    def _drop_all(self) -> None:
        for sequence in list(self._sequences.values()):
            self.scheduler.finish(sequence)
            self._forget(sequence.request)
        while self._in_flight:
            self._retire(StepOutput(self.scheduler.steps))
        with self._lock:
            self._inbox.clear()
            self._preparing.clear()
            self._held.clear()


def _records(sequences: list[Sequence]) -> NDArray[np.int64]:
    return np.fromiter((sequence.record for sequence in sequences), np.int64, len(sequences))


def _key(request: EngineRequest) -> Key:
    return request.request_id, request.choice


def _constraint_failed(request: EngineRequest, message: str) -> RequestError:
    return RequestError(request.request_id, request.choice, request.epoch, ErrorCode.CONSTRAINT_FAILED, message)


def _rejected(request: EngineRequest, code: str, message: str) -> RequestRejected:
    return RequestRejected(RequestError(request.request_id, request.choice, request.epoch, code, message))
