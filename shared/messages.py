"""Every message that one stage sends to another, in one place.

They are NamedTuples: on the wire each is a MessagePack array `[tag, field, field, ...]` (shared/codec.py). A field may only ever be
added at the end and with a default, so that stages of two versions understand each other during a rolling upgrade.

`key` is always the request's name inside Gorgon, `<tenant>.<id>` (subjects.request_key). Token ids travel packed as little-endian
int32 (`codec.pack_ids`). What clients send and get is in shared/api.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from shared.sampling import SamplingParams

# In place of the number of a choice: the prompt, whose tokens have log-probabilities (and text) to be told, too.
PROMPT = -1

# ---------------------------------------------------------------- client side of a request


class ReplyTo(NamedTuple):
    """Where and how a client wants its events. `subject` is empty for a durable request (its events go to RESULTS)."""

    subject: str
    encoding: str = "json"  # "json" or "msgpack"
    batched: bool = False  # the client takes arrays of events, of several requests, in one message
    stream: bool = True  # False: only the terminal event, with the whole text


# ---------------------------------------------------------------- stream REQ: tokenizer → scheduler


class Request(NamedTuple):
    """An accepted request. Its place in REQ (the sequence) is its identity; the prompt is read from there at every migration."""

    key: str
    model: str
    body_hash: (
        bytes  # of all that makes it this request (shared.api.hash_body): the same id with another body is an error
    )
    prompt_ids: bytes
    sampling: SamplingParams
    reply: ReplyTo
    stop: tuple[str, ...] = ()
    choices: int = 1
    durable: bool = False
    priority: int = 0  # higher first, -100..100
    deadline: float | None = None  # seconds from REQ's store time
    metadata: dict[str, Any] = {}  # noqa: RUF012 - never mutated; echoed in the terminal event
    trace: str = ""  # W3C traceparent
    tokenize_ms: float = 0.0  # time spent in the tokenizer, for the timings of the terminal event
    tool_format: str = ""  # of shared.tool_calls, if calls are to be looked for in the text
    best: int = 0  # the client is told of so many of the choices, the likeliest, at the end; 0: of all, as they come
    echo: bool = False  # the client is told the prompt's text, too
    constraint: str = ""  # the grammar that each choice must follow (shared/structured.py); "": none
    refused_as: str = (
        ""  # of a durable request whose own id may have another's results: the id under which a refusal is told
    )


# ---------------------------------------------------------------- stream TOK: the token log (folded by shared/tokenlog.py)


class Open(NamedTuple):
    """Written by the scheduler before the first `run`: everything a detokenizer needs to serve the request."""

    key: str
    reply: ReplyTo
    req_seq: int
    prompt_tokens: int
    max_tokens: int
    stop: tuple[str, ...] = ()
    choices: int = 1
    logprobs: bool = False
    durable: bool = False
    metadata: dict[str, Any] = {}  # noqa: RUF012
    trace: str = ""
    tokenize_ms: float = 0.0
    queue_ms: float = 0.0  # from REQ's store time to OPEN
    tool_format: str = ""
    best: int = 0  # as in Request
    prompt_logprobs: bool = False  # TOKENS of the choice PROMPT come before those of others count
    prompt_ids: bytes = b""  # if the prompt is to be echoed
    revision: int = 0  # of the Assignment in epoch 1, 0: not known; the tombstone replaces it, if nothing else has
    body_hash: bytes = b""


class Attach(NamedTuple):
    """The client wants its events elsewhere from now on."""

    key: str
    reply: ReplyTo


class TokenLogprobs(NamedTuple):
    chosen: float
    top_ids: bytes
    top: tuple[float, ...]


class Failure(NamedTuple):
    code: str
    message: str


class Tokens(NamedTuple):
    """Tokens of one choice, generated but committed only once the fold accepts them. Of the choice PROMPT: tokens of the prompt, for
    their log-probabilities (the first has none: 0.0 and no alternatives).

    position   index of ids[0] among the generated tokens of the choice (PROMPT: in the prompt)
    finish     None while the choice goes on, else "stop" (end of sequence), "stop_token", "length", "deadline" or "error"
    stop       the id that ended it, for finish "stop" and "stop_token"; such an id is the last of `ids` and is not shown as text
    failure    for finish "error" (and "deadline"): fails the whole request
    cached     with a request's first tokens: so many of the prompt's tokens were in the worker's prefix cache
    """

    key: str
    choice: int
    epoch: int
    position: int
    ids: bytes
    finish: str | None = None
    stop: int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    failure: Failure | None = None
    cached: int = 0


class StepTokens(NamedTuple):
    """All tokens of one engine step that belong to one partition."""

    worker: str
    step: int
    entries: tuple[Tokens, ...]


class Fence(NamedTuple):
    """Written by the scheduler before every re-target. The highest epoch wins; lower ones are ignored."""

    key: str
    epoch: int


class End(NamedTuple):
    """Terminal by decree: by the scheduler for the whole request (choice -1), or by the partition's owner for a choice whose text
    hit a stop string. `reason` is "cancelled", "error" or "stop"; `length` (for "stop") is the number of tokens that count."""

    key: str
    reason: str
    choice: int = -1
    length: int = -1
    failure: Failure | None = None
    stop: str | None = None


LogEntry = Open | Attach | StepTokens | Fence | End

# ---------------------------------------------------------------- scheduler ↔ worker (core)


class Run(NamedTuple):
    """Order to generate. `generated` holds the committed prefix of each choice (empty at first), `done` the choices that already
    finished, `prompt_done` tokens of the prompt have committed log-probabilities (where they are wanted); positions, penalties, seeds
    and max_tokens count from the original prompt."""

    key: str
    epoch: int
    prompt_ids: bytes
    sampling: SamplingParams
    choices: int = 1
    generated: tuple[bytes, ...] = ()
    done: tuple[int, ...] = ()
    priority: int = 0
    deadline: float | None = None  # seconds left
    isolated: bool = False  # a suspect: run it in a step of its own
    trace: str = ""
    prompt_done: int = 0
    constraint: str = ""  # as in Request


class RunReply(NamedTuple):
    """`accepted`: the worker has it (also the answer to a repeated Run). Otherwise `code` says why: "overloaded", "draining",
    "stale_epoch", or a final error code such as context_length_exceeded that ends the request. `only_this`: it is overloaded for
    this request alone, which must have no company."""

    accepted: bool
    code: str = ""
    message: str = ""
    only_this: bool = False


class Abort(NamedTuple):
    """Stop working on the request, in this and every lower epoch."""

    key: str
    epoch: int


# ---------------------------------------------------------------- scheduler → detokenizer (core)


class PrefixQuery(NamedTuple):
    """Asked of a partition's owner after FENCE(epoch). It is answered from inside that FENCE's fold, or later, never earlier."""

    key: str
    epoch: int


class PrefixReply(NamedTuple):
    """`state`: "running" (the prefix is the one fixed by the fence), "ended", "superseded" (a higher epoch is in force),
    or "pending" (this owner has not folded the fence yet: ask again)."""

    state: str
    epoch: int = 0
    generated: tuple[bytes, ...] = ()
    done: tuple[int, ...] = ()
    prompt_done: int = 0


# ---------------------------------------------------------------- gateway → tokenizer (core)


class PiecesQuery(NamedTuple):
    """What token ids stand for."""

    ids: bytes


class PiecesReply(NamedTuple):
    """`pieces`: the bytes of each id that was asked for, b"" for one that stands for nothing; `special`: those among them that leave no
    text."""

    pieces: tuple[bytes, ...]
    special: bytes = b""


# ---------------------------------------------------------------- KV bucket `assign`, key = request key


class Assignment(NamedTuple):
    """Who works on a live request. Created and changed by schedulers only, by compare-and-swap.

    `worker` is an incarnation, or "" while the request waits for one after a migration. `choices`: sequences that the request takes
    there, beams included."""

    req_seq: int
    epoch: int
    worker: str
    body_hash: bytes
    suspect: int = 0  # deaths in a row without progress (services/scheduler/suspicion.py)
    died_at: int = -1  # committed tokens at the last of them
    choices: int = 1
    model: str = ""  # the bucket is shared by all


class Tombstone(NamedTuple):
    """Replaces the Assignment when the request has ended. Written by the partition's owner only."""

    req_seq: int
    epoch: int
    reason: str
    body_hash: bytes
    completion_tokens: int = 0


# ---------------------------------------------------------------- heartbeats (core)


class Heartbeat(NamedTuple):
    """Every stage's sign of life. Times are durations: clocks of two machines are never compared.

    load       0..1, for gorgon ps
    detail     stage-specific counters, for gorgon ps and tests (numbers and strings only)
    draining   takes no new work; its partitions or requests move elsewhere
    knows      how much of what it is sent it understands (shared/capabilities.py)
    """

    stage: str
    model: str
    instance: str
    beat: int  # grows by one each beat
    interval: float  # seconds until the next one
    draining: bool = False
    load: float = 0.0
    in_flight: int = 0
    detail: dict[str, Any] = {}  # noqa: RUF012
    knows: Mapping[str, int] = {}


class WorkerHeartbeat(NamedTuple):
    """A worker's heartbeat: liveness is progress, so it tells the step counter and how long the current step may take.

    running    {request key: epoch} of everything the worker holds until its finish is acked
    step_age   seconds since the current step began, 0 when idle;  step_bound: the longest that step may take
    """

    base: Heartbeat
    step: int
    step_age: float
    step_bound: float
    running: dict[str, int]
    max_seqs: int
    kv_tokens_total: int
    kv_tokens_free: int
    max_model_len: int
    vocab_size: int
    suspects: tuple[str, ...] = ()  # requests in the step that just failed, when the worker dies of an exception
    isolated: tuple[str, ...] = ()  # requests in steps of their own, not one token further yet
    behind: tuple[str, ...] = ()  # requests that came while the current step was under way
    cleared: tuple[str, ...] = ()  # those of `isolated` that came through steps whose tokens the log has yet to take
