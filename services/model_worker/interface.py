"""The engine's vocabulary: what goes in, what comes out. No torch, no NATS, of the wire no more than a number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain

from shared.messages import PROMPT
from shared.sampling import SamplingParams

__all__ = [
    "PROMPT",
    "EngineOverloaded",
    "EngineRequest",
    "EngineStats",
    "FinishReason",
    "RequestError",
    "RequestRejected",
    "SpeculationStats",
    "StepOutput",
    "TokenLogprobs",
    "TokenOutput",
    "TokenRows",
]


class FinishReason(StrEnum):
    STOP = "stop"  # one of the model's own end-of-sequence ids
    STOP_TOKEN = "stop_token"  # one of the request's stop_token_ids
    LENGTH = "length"  # max_tokens or the context limit
    DEADLINE = "deadline"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate: choice `choice` of a request. Sequences of one request and epoch share their prompt's KV blocks.

    prompt_ids     the original prompt
    generated_ids  what was generated and committed elsewhere before (a migrated request). Positions, penalties, noise and
                   max_tokens count from the original prompt, so the output continues as if never interrupted
    priority       higher runs first; among equals first come, first served
    deadline       time.monotonic() seconds, or None
    isolated       no step with this request holds another one, until each of its choices has a new token: it is suspected to kill
                   its worker
    prompt_done    None: the prompt's log-probabilities are not wanted of this sequence. k: those of the tokens from k on are, with
                   params.prompt_logprobs alternatives
    choices        of a beam search, which is one sequence for the engine: what it finds are the choices 0 … choices - 1, and `choice`
                   stands for them all until then
    constraint     the grammar that the generated text must follow (shared/structured.py); "": none
    """

    request_id: str
    choice: int
    epoch: int
    prompt_ids: SequenceABC[int]
    params: SamplingParams
    generated_ids: SequenceABC[int] = ()
    priority: int = 0
    deadline: float | None = None
    isolated: bool = False
    prompt_done: int | None = None
    choices: int = 1
    constraint: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one token: its log-probability, and the likeliest ids with theirs, best first (as many as the request asked for)."""

    chosen: float
    top_ids: list[int]
    top: list[float]


@dataclass(frozen=True, slots=True)
class RequestSpeculation:
    """How guessing went for one sequence.

    plain, drafted   steps without guesses, and with; the prompt's are not counted
    accepted         by head: in how many steps its guess was accepted
    nodes            of the trees of all drafted steps together
    """

    plain: int
    drafted: int
    accepted: tuple[int, ...]
    nodes: int

    @property
    def tokens_per_step(self) -> float:
        """Mean over the drafted."""
        return 1 + sum(self.accepted) / max(1, self.drafted)


@dataclass(slots=True)
class TokenOutput:
    """New tokens of one sequence; with choice PROMPT tokens of the prompt, in order and once, for their log-probabilities (of the
    prompt's first token there is none: 0.0 and no alternatives).

    position    index of ids[0] among the sequence's generated tokens (of all epochs)
    ids         may be empty when `finish` comes without a token (deadline, aborted); includes the id that stopped the sequence
    logprobs    one for each id, or None if the request asked for none
    stop_token  the id that stopped the sequence, with finish STOP or STOP_TOKEN
    speculation  with a finish, if the model has a drafter
    score      of a hypothesis of a beam search

    Without ids and finish it only tells that an isolated request has survived a step.
    """

    request_id: str
    choice: int
    epoch: int
    position: int
    ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish: FinishReason | None = None
    stop_token: int | None = None
    speculation: RequestSpeculation | None = None
    score: float | None = None


@dataclass(slots=True)
class TokenRows:
    """New tokens of many sequences that go on, in parallel lists; iterating gives them as TokenOutputs.

    requests   the same list again as long as the batch stays the same
    """

    requests: list[EngineRequest]
    positions: list[int]
    ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[TokenOutput]:
        for request, position, ids in zip(self.requests, self.positions, self.ids, strict=True):
            yield TokenOutput(request.request_id, request.choice, request.epoch, position, ids)


@dataclass(frozen=True, slots=True)
class RequestError:
    """One sequence failed; nothing else did. `code` is stable, `retryable` says whether another worker may succeed."""

    request_id: str
    choice: int
    epoch: int
    code: str
    message: str
    retryable: bool = False


@dataclass(frozen=True, slots=True)
class SlotGiven:
    """A sequence has got its slot (again, after a preemption), at `when`, time.monotonic() seconds. cached: so many of its tokens were
    in the prefix cache."""

    request_id: str
    choice: int
    epoch: int
    when: float
    cached: int = 0


@dataclass(slots=True)
class StepOutput:
    """What a step brought; `seconds` is the time that it took, None where no step retired. Steps that only compute a part of a prompt
    have neither tokens nor errors.

    rows   further tokens: those of sequences that just go on. If one of them is in `tokens`, too, then with earlier ones
    """

    step: int
    tokens: list[TokenOutput] = field(default_factory=list)
    errors: list[RequestError] = field(default_factory=list)
    admitted: list[SlotGiven] = field(default_factory=list)
    seconds: float | None = None
    rows: TokenRows | None = None

    @property
    def outputs(self) -> Iterable[TokenOutput]:
        """All tokens."""
        return self.tokens if self.rows is None else chain(self.tokens, self.rows)


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Since the start, over the steps that decoded.

    steps      by nodes of the tree, 1: plain decoding
    drafted    (sequence, step) pairs with a tree
    accepted   by head: how many of them accepted its guess; entry 0 is the first guessed token
    average    how well drafts do now, 1: as well as the trees' design promised
    """

    steps: dict[int, int]
    drafted: int
    accepted: list[int]
    average: float

    @property
    def tokens_per_step(self) -> float:
        """Mean over the drafted."""
        return 1 + sum(self.accepted) / max(1, self.drafted)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot. Blocks and slots that a finished sequence still holds in a step in flight count as used.

    step          steps launched so far
    step_started  time.monotonic() of the oldest step in flight, None when idle
    step_bound    seconds that this step may take before the engine should be taken for stalled
    running       {request id: epoch} of all requests held, waiting ones included
    """

    step: int
    step_started: float | None
    step_bound: float
    running: dict[str, int]
    waiting: int
    batch_size: int
    blocks_free: int
    blocks_total: int
    slots_free: int
    slots_total: int
    prompt_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    tokens_generated: int
    speculation: SpeculationStats | None = None


class EngineOverloaded(RuntimeError):
    """The queue of waiting sequences is full, or the engine is draining: try another worker."""


class RequestRejected(ValueError):
    """The request can never run here; `error` says why."""

    def __init__(self, error: RequestError) -> None:
        super().__init__(f"{error.code}: {error.message}")
        self.error = error
