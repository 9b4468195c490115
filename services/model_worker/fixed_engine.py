"""An engine without a model: deterministic tokens at a given pace, driven by the running loop's clock (a virtual one included).

A token depends on prompt, seed, choice and all tokens of the choice before it, and on nothing else. So the stream of a migrated
request equals the uninterrupted one exactly if the worker that took it over was given the right prefix, and `expected_ids` tells a
test what it must be.
"""

from __future__ import annotations

import asyncio
import os
import signal
import zlib
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import count

from services.model_worker.engine_api import EngineLimits, OnFatal, OnSteps, Progress
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
from services.model_worker.search.strategy import Strategy
from services.model_worker.settings import Fault, FixedEngineSettings
from shared.codec import pack_ids
from shared.errors import ErrorCode

BLOCK_SIZE = 16
_MASK = (1 << 64) - 1


class FixedSequence:
    """One choice of a request. `state` is a hash of everything that came before the next token."""

    __slots__ = ("fault", "generated", "limit", "order", "reported", "request", "state", "stop_ids")

    def __init__(self, request: EngineRequest, order: tuple[int, int], settings: FixedEngineSettings) -> None:
        params = request.params
        self.request = request
        self.order = order
        self.limit = min(params.max_tokens, settings.max_model_len - len(request.prompt_ids))
        self.stop_ids = {} if params.ignore_eos else {settings.eos_id: FinishReason.STOP}
        self.stop_ids.update(dict.fromkeys(params.stop_token_ids, FinishReason.STOP_TOKEN))
        self.state = zlib.crc32(pack_ids(request.prompt_ids)) << 32 ^ params.seed ^ request.choice << 56
        for token in request.generated_ids:
            self._absorb(token)
        self.generated = len(request.generated_ids)
        self.reported = len(request.prompt_ids) if request.prompt_done is None else request.prompt_done
        faults = [fault for token, fault in settings.faults.items() if token in request.prompt_ids]
        self.fault: Fault | None = min(faults, key=lambda fault: fault.position, default=None)

    def __lt__(self, other: FixedSequence) -> bool:
        return self.order < other.order

    def _absorb(self, token: int) -> None:
        # One step of a linear congruential generator (Knuth's MMIX constants), disturbed by the token.
        self.state = (self.state * 6364136223846793005 + 1442695040888963407 + token) & _MASK

    def next_token(self, settings: FixedEngineSettings) -> int:
        if self.generated + 1 == settings.eos_after and not self.request.params.ignore_eos:
            token = settings.eos_id
        else:
            token = settings.first_id + (self.state >> 33) % (settings.vocab_size - settings.first_id)
        self._absorb(token)
        self.generated += 1
        return token

    def finish_reason(self, token: int) -> FinishReason | None:
        return self.stop_ids.get(token) or (FinishReason.LENGTH if self.generated >= self.limit else None)

    @property
    def blocks(self) -> int:
        return -(-(len(self.request.prompt_ids) + self.generated) // BLOCK_SIZE)


def expected_ids(request: EngineRequest, settings: FixedEngineSettings) -> list[int]:
    """What the engine generates for the request if nothing goes wrong, `generated_ids` not included."""
    sequence = FixedSequence(request, (0, 0), settings)
    ids: list[int] = []
    while sequence.generated < sequence.limit and not (ids and sequence.finish_reason(ids[-1])):
        ids.append(sequence.next_token(settings))
    return ids


def fixed_logprob(token: int) -> float:
    """The log-probability that the engine says a token has."""
    return -0.5 - (token * 37 % 101) / 64


class FixedEngine:
    """See engine_api.Engine. `sequence` says what is generated."""

    sequence: type[FixedSequence] = FixedSequence

    def __init__(
        self, settings: FixedEngineSettings, max_seqs: int, max_waiting: int, on_steps: OnSteps, on_fatal: OnFatal
    ) -> None:
        self._settings = settings
        self._max_seqs = max_seqs
        self._max_waiting = max_waiting
        self._on_steps = on_steps
        self._on_fatal = on_fatal
        self._running: dict[tuple[str, int], FixedSequence] = {}  # (request id, choice)
        self._waiting: list[FixedSequence] = []  # a heap
        self._arrivals = count()
        self._paused = False
        self._stopped = False
        self._timer: asyncio.Handle | None = None
        self._step_started: float | None = None
        self._steps = self._tokens = self._prompt_tokens = 0
        self._admitted: list[SlotGiven] = []

    @property
    def limits(self) -> EngineLimits:
        return EngineLimits(self._settings.max_model_len, self._settings.vocab_size, self._max_seqs, BLOCK_SIZE)

    async def load(self, progress: Progress) -> None:
        progress("no weights to load", 1.0)

    async def stop(self) -> None:
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        self._running.clear()
        self._waiting.clear()
        self._step_started = None

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        for request in requests:
            self._check(request)
        held = len(self._running) + len(self._waiting)
        if self._stopped or held + len(requests) > self._max_seqs + self._max_waiting:
            raise EngineOverloaded(f"{held} sequences are held already")
        for request in requests:
            heappush(self._waiting, self.sequence(request, (-request.priority, next(self._arrivals)), self._settings))
            self._prompt_tokens += len(request.prompt_ids)
        self._begin_step()

    def _check(self, request: EngineRequest) -> None:
        settings = self._settings
        length = len(request.prompt_ids)
        if length + min(1, request.params.max_tokens) > settings.max_model_len:
            code, message = (
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"{length} tokens do not fit into {settings.max_model_len}",
            )
        elif not all(0 <= token < settings.vocab_size for token in request.prompt_ids):
            code, message = ErrorCode.INVALID_REQUEST, f"a token id is outside the vocabulary of {settings.vocab_size}"
        elif Strategy.of(request.params) is not Strategy.SAMPLING:
            code, message = ErrorCode.UNSUPPORTED, "the fixed engine has no model to search in"
        elif request.constraint:
            code, message = ErrorCode.UNSUPPORTED, "the engine without a model has no grammars"
        else:
            return
        raise RequestRejected(RequestError(request.request_id, request.choice, request.epoch, code, message))

    def abort(self, request_id: str, epoch: int) -> None:
        def ended(sequence: FixedSequence) -> bool:
            return sequence.request.request_id == request_id and sequence.request.epoch <= epoch

        self._running = {name: s for name, s in self._running.items() if not ended(s)}
        self._waiting = [s for s in self._waiting if not ended(s)]
        heapify(self._waiting)

    def pause(self, paused: bool) -> None:
        self._paused = paused
        if not paused:
            self._begin_step()

    def stats(self) -> EngineStats:
        blocks = max(1, self._settings.kv_tokens // BLOCK_SIZE)
        held = {s.request.request_id: s.request.epoch for s in (*self._waiting, *self._running.values())}
        return EngineStats(
            step=self._steps,
            step_started=self._step_started,
            step_bound=4 * self._settings.step_time + 0.5,
            running=held,
            waiting=len(self._waiting),
            batch_size=len(self._running),
            blocks_free=max(0, blocks - sum(s.blocks for s in self._running.values())),
            blocks_total=blocks,
            slots_free=self._max_seqs - len(self._running),
            slots_total=self._max_seqs,
            prompt_tokens=self._prompt_tokens,
            prefix_hit_tokens=0,
            preemptions=0,
            tokens_generated=self._tokens,
        )

    def check_idle(self) -> list[str]:
        return [f"{len(self._running)} running, {len(self._waiting)} waiting"] if self._running or self._waiting else []

    # ------------------------------------------------ steps

    def _begin_step(self, planned: float = 0.0) -> None:
        """`planned`: when the step before was due to end. Steps keep that beat as long as the loop keeps up with it."""
        if self._step_started is not None or self._paused or self._stopped:
            return
        while self._waiting and len(self._running) < self._max_seqs:
            sequence = heappop(self._waiting)
            name = sequence.request.request_id, sequence.request.choice
            self._running[name] = sequence
            self._admitted.append(SlotGiven(*name, sequence.request.epoch, asyncio.get_running_loop().time()))
        if not self._running:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        begin = planned if now - planned < self._settings.step_time else now
        self._step_started = now
        self._steps += 1
        batch = self._batch()
        end = begin + self._settings.step_time
        if end > now:
            self._timer = loop.call_at(end, self._end_step, batch, end)
        else:
            self._timer = loop.call_soon(self._end_step, batch, end)

    def _batch(self) -> list[FixedSequence]:
        """All running sequences, or those of one request that must run apart."""
        for (request_id, _), sequence in self._running.items():
            if sequence.request.isolated and sequence.generated == len(sequence.request.generated_ids):
                return [s for (other, _), s in self._running.items() if other == request_id]
        return list(self._running.values())

    def _end_step(self, batch: list[FixedSequence], planned: float) -> None:
        output = StepOutput(self._steps)
        now = asyncio.get_running_loop().time()
        live = self._running
        for sequence in batch:
            name = sequence.request.request_id, sequence.request.choice
            if live.get(name) is not sequence:
                continue  # aborted meanwhile
            if sequence.fault is not None and sequence.generated >= sequence.fault.position:
                if not self._strike(sequence.fault, sequence, batch, output):
                    return
                del live[name]
                continue
            if self._generate(sequence, output):
                del live[name]
        self._expire(now, output)
        assert self._step_started is not None
        output.seconds = now - self._step_started
        output.admitted, self._admitted = self._admitted, []
        self._step_started = None
        self._begin_step(planned)
        self._on_steps([output])

    def _generate(self, sequence: FixedSequence, output: StepOutput) -> bool:
        """One token, or some of the prompt's; True if it is the last."""
        request = sequence.request
        if sequence.reported < len(request.prompt_ids):
            self._report(sequence, output)
            return False
        position = sequence.generated
        if position >= sequence.limit:
            output.tokens.append(
                TokenOutput(request.request_id, request.choice, request.epoch, position, [], finish=FinishReason.LENGTH)
            )
            return True
        token = sequence.next_token(self._settings)
        finish = sequence.finish_reason(token)
        result = TokenOutput(request.request_id, request.choice, request.epoch, position, [token], finish=finish)
        if finish is not None and finish is not FinishReason.LENGTH:
            result.stop_token = token
        if (wanted := request.params.worker_logprobs) is not None:
            result.logprobs = [self._logprobs(token, wanted)]
        output.tokens.append(result)
        self._tokens += 1
        return finish is not None

    def _logprobs(self, token: int, top: int) -> TokenLogprobs:
        """It tells choices apart: the token's own is a function of its id."""
        likeliest = [(token + i) % self._settings.vocab_size for i in range(top)]
        own = fixed_logprob(token)
        return TokenLogprobs(own, likeliest, [own - i for i in range(top)])

    def _report(self, sequence: FixedSequence, output: StepOutput) -> None:
        request, start = sequence.request, sequence.reported
        ids = list(request.prompt_ids[start : start + self._settings.prompt_rows])
        sequence.reported += len(ids)
        top = request.params.prompt_logprobs or 0
        rows = [TokenLogprobs(0.0, [], []) if start + i == 0 else self._logprobs(t, top) for i, t in enumerate(ids)]
        output.tokens.append(TokenOutput(request.request_id, PROMPT, request.epoch, start, ids, rows))

    def _expire(self, now: float, output: StepOutput) -> None:
        late = [s for s in self._all() if s.request.deadline is not None and s.request.deadline <= now]
        for sequence in late:
            request = sequence.request
            output.tokens.append(
                TokenOutput(
                    request.request_id,
                    request.choice,
                    request.epoch,
                    sequence.generated,
                    [],
                    finish=FinishReason.DEADLINE,
                )
            )
            self.abort(request.request_id, request.epoch)

    def _all(self) -> Iterable[FixedSequence]:
        yield from self._running.values()
        yield from self._waiting

    def _strike(self, fault: Fault, sequence: FixedSequence, batch: list[FixedSequence], output: StepOutput) -> bool:
        """Lets the fault happen; False if the step does not survive it."""
        request = sequence.request
        match fault.kind:
            case "error":
                error = RequestError(
                    request.request_id, request.choice, request.epoch, ErrorCode.INTERNAL, "injected fault"
                )
                output.errors.append(error)
                return True
            case "raise":
                self._stopped = True
                self._on_fatal(RuntimeError("injected fault"), list(dict.fromkeys(s.request.request_id for s in batch)))
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                pass  # `_step_started` stands for ever
        return False
