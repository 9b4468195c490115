"""What the engine knows about one sequence while it generates it."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable
from enum import Enum, auto
from typing import Any, Protocol

from services.model_worker.block_pool import block_hash
from services.model_worker.interface import EngineRequest, FinishReason
from services.model_worker.search.beam_group import BeamGroup
from services.model_worker.search.strategy import Strategy


class Matcher(Protocol):
    """See shared.structured.Matcher."""

    complete: bool
    error: str

    def advance(self, tokens: Iterable[int]) -> bool: ...


class Status(Enum):
    WAITING = auto()  # in the queue, holds nothing
    RUNNING = auto()  # holds a slot and blocks, takes part in steps
    PREEMPTED = auto()  # gives back what it holds as soon as no step in flight uses it, then waits again
    FINISHED = auto()  # the same, then is gone


class Sequence:
    """Token counts run ahead of what is known, since steps are launched before earlier ones are read back:

    tokens    prompt and generated tokens that were read back
    pending   tokens that launched steps will have generated at least, ids not yet known to the host
    computed  tokens whose keys and values the launched steps will have written to the cache at least
    slack     how many more they may generate and write, by accepted guesses
    verified  those of them that retired steps have written, ids known: their blocks may be shared
    inflight  launched steps, not yet retired, that this sequence takes part in
    reported  tokens of the prompt whose log-probabilities the launched steps will have told, or need not
    """

    __slots__ = (
        "block_hashes", "blocks", "cached", "candidates", "computed", "device_row", "edit_row", "group", "inflight",
        "lag", "limit", "matcher", "memory", "order", "pending", "plain", "prompt_len", "record", "registered", "released", "reported",
        "request", "sampling_mode", "slack", "slot", "status", "stops", "strategy", "tokens", "verified",
    )  # fmt: skip

    def __init__(self, request: EngineRequest, arrival: int, eos_ids: Collection[int], max_model_len: int) -> None:
        params = request.params
        self.request = request
        self.order = (-request.priority, arrival)
        self.tokens = array("i", request.prompt_ids)
        self.prompt_len = len(self.tokens)
        self.tokens.extend(request.generated_ids)
        self.reported = self.prompt_len if request.prompt_done is None else min(request.prompt_done, self.prompt_len)
        # Longest total length. The request's own stop ids win over the model's, so that the reason given is the caller's.
        self.limit = min(self.prompt_len + params.max_tokens, max_model_len)
        self.stops = {} if params.ignore_eos else dict.fromkeys(eos_ids, FinishReason.STOP)
        self.stops.update(dict.fromkeys(params.stop_token_ids, FinishReason.STOP_TOKEN))
        self.strategy = Strategy.of(params)
        self.plain = self.strategy is Strategy.SAMPLING
        # Candidates of a step, and newest tokens that are not in the cache yet when it begins: contrastive search tries, and so
        # computes, its next token in the step that chooses it.
        contrastive = self.strategy is Strategy.CONTRASTIVE_SEARCH
        self.candidates, self.lag = (params.top_k, 0) if contrastive else (1, 1)
        self.group: BeamGroup | None = None
        if self.strategy is Strategy.BEAM_SEARCH:
            self.group = BeamGroup(request, self.stops, self.limit - self.prompt_len)
        self.status = Status.WAITING
        self.slot = -1
        self.memory = -1  # where contrastive search keeps its hidden states
        self.blocks: list[int] = []  # -1: released, wholly before the attention window
        self.block_hashes: list[bytes] = []  # of the full blocks of `tokens`, as far as needed yet
        self.inflight = 0
        self.pending = 0
        self.slack = 0
        # What the model runner wants to know of the sequence, worked out once; nothing to the scheduler.
        self.device_row: Any = None
        self.edit_row: Any = None
        self.sampling_mode: Any = None
        self.record = 0  # of its guesses, in the tree controller's table
        self.matcher: Matcher | None = None  # where `tokens` stand in the grammar that they must follow, if any
        self.reset(0)

    def __lt__(self, other: Sequence) -> bool:
        """Runs before: priority, then arrival."""
        return self.order < other.order

    def reset(self, cached: int) -> None:
        """Start (again) with `cached` tokens in the cache, from shared blocks that are registered already."""
        self.cached = self.computed = self.verified = cached
        self.registered = self.released = 0

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def is_proven(self) -> bool:
        """For an isolated sequence: it has not killed its worker before its next token, so it may meet others again."""
        survived = self.group is not None and self.group.steps > 0
        return self.status is Status.FINISHED or survived or self.num_generated > len(self.request.generated_ids)

    @property
    def width(self) -> int:
        """Slots that it takes."""
        return 1 if self.group is None else self.group.width

    @property
    def step_rows(self) -> int:
        """Rows of a step that takes it further, without guesses."""
        return self.candidates if self.group is None else self.group.rows

    @property
    def prefill_end(self) -> int:
        """Known tokens that are computed in chunks. The last one of a search is left to its first step, which looks at its logits in
        a way of its own."""
        beforehand = self.strategy in (Strategy.BEAM_SEARCH, Strategy.CONTRASTIVE_DECODING)
        return len(self.tokens) - 1 if beforehand else len(self.tokens)

    @property
    def reports(self) -> bool:
        """Log-probabilities of its prompt are still to be computed."""
        return self.reported < self.prompt_len

    @property
    def reusable(self) -> int:
        """How many of its tokens may come from somebody else's cache: the row of the last is wanted, and so are those of the tokens
        before the ones to be reported. Contrastive search wants the hidden states of all."""
        if self.strategy is Strategy.CONTRASTIVE_SEARCH:
            return 0
        return max(0, self.reported - 1) if self.reports else len(self.tokens) - 1

    def finish_reason(self) -> FinishReason | None:
        """Why the tokens read back so far end here, if they do."""
        if self.num_generated and (reason := self.stops.get(self.tokens[-1])) is not None:
            return reason
        if self.matcher is not None and self.matcher.complete:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.limit else None

    def hashes(self, count: int, block_size: int) -> list[bytes]:
        """Digests of the first `count` blocks, all full of known tokens."""
        known = self.block_hashes
        while len(known) < count:
            start = len(known) * block_size
            parent = known[-1] if known else self.strategy.root_hash
            known.append(block_hash(parent, self.tokens[start : start + block_size]))
        return known[:count]
