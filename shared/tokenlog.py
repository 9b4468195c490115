"""The fold of the token log: one pure function that every reader of a partition runs alike.

A partition of TOK is totally ordered, so whoever folds its entries from the beginning (or from a snapshot) reaches the same state.
*Committed* means accepted by this fold, nothing else. Each rule is one method, so that a test can take it away and see a seed fail:

    is_current           TOKENS count only in the epoch in force
    is_duplicate         positions below the length were committed before: dropped
    holds                positions above the length wait until the gap is filled
    awaits_prompt        where the prompt's log-probabilities are told, the tokens of choices wait until all of them are there
                         (but not a failure)
    waits_for_open       TOKENS before OPEN wait for it: a scheduler orders the run while OPEN is on its way
    raises_epoch         FENCE is monotone: only a higher epoch takes effect
    clear_held           FENCE forgets what the old epoch left waiting, and fixes `base` = length, where the new epoch begins
    is_open_for_entries  the first terminal entry in log order wins; everything after it is dropped
    remembers_early_end  END before OPEN (a cancel that overtook its request) counts
    keeps_attached_reply ATTACH before OPEN wins over OPEN's reply

Time is the stream's (the store time of entries), so pruning is the same for every reader as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import msgpack

from shared import messages as m
from shared.codec import rebuild, unpack_ids

# A choice that ended so has simply finished; any other finish ("deadline", "error") fails the request.
FINISHED = frozenset({"stop", "stop_token", "length", "stop_string"})


@dataclass(slots=True)
class Choice:
    """One of the `n` completions of a request. `base` is the length when the epoch in force began."""

    ids: list[int] = field(default_factory=list)
    base: int = 0
    finish: str | None = None
    stop: str | int | None = None  # the stop string or stop id
    length: int = 0  # tokens that count for usage, once finished


class Terminal(NamedTuple):
    """How a request ended: "finished", "cancelled" or "error"."""

    reason: str
    failure: m.Failure | None = None


@dataclass(slots=True)
class RequestState:
    key: str
    opened: m.Open | None = None
    reply: m.ReplyTo | None = None
    epoch: int = 1
    choices: list[Choice] = field(default_factory=list)
    held: dict[tuple[int, int], m.Tokens] = field(default_factory=dict)  # (choice, position)
    terminal: Terminal | None = None
    prompt: Choice | None = None  # the prompt's tokens whose log-probabilities are committed, if they are wanted
    touched: float = 0.0  # store time of the last entry about it, up to the one that ended it
    req_seq: int = 0  # its place in REQ, by OPEN
    cached: int = 0  # tokens of the prompt that its first worker had in its prefix cache

    @property
    def prefix(self) -> tuple[list[int], ...]:
        """What had been committed of each choice when the epoch in force began."""
        return tuple(c.ids[: c.base] for c in self.choices)

    @property
    def prompt_done(self) -> int:
        """How many tokens of the prompt had been committed when the epoch in force began."""
        return self.prompt.base if self.prompt is not None else 0

    @property
    def completion_tokens(self) -> int:
        return sum(c.length if c.finish else len(c.ids) for c in self.choices)


# ---------------------------------------------------------------- what an entry did


class Opened(NamedTuple):
    key: str


class Attached(NamedTuple):
    key: str
    reply: m.ReplyTo


class Committed(NamedTuple):
    """`ids` extend the choice (or PROMPT) from `position` on. A finish without ids has an empty list."""

    key: str
    choice: int
    position: int
    ids: list[int]
    logprobs: tuple[m.TokenLogprobs, ...] | None


class ChoiceFinished(NamedTuple):
    key: str
    choice: int


class Fenced(NamedTuple):
    key: str
    epoch: int


class Ended(NamedTuple):
    """The request is terminal. Exactly one of these for each request, as the last of its effects."""

    key: str
    terminal: Terminal


Effect = Opened | Attached | Committed | ChoiceFinished | Fenced | Ended


class PartitionFold:
    """State of one partition: `requests` by key, those that ended included until `prune` forgets them."""

    def __init__(self) -> None:
        self.requests: dict[str, RequestState] = {}

    # ------------------------------------------------------------ the rules

    def is_current(self, request: RequestState, tokens: m.Tokens) -> bool:
        return tokens.epoch == request.epoch

    def is_duplicate(self, choice: Choice, tokens: m.Tokens) -> bool:
        return tokens.position < len(choice.ids)

    def holds(self, choice: Choice, tokens: m.Tokens) -> bool:
        return tokens.position > len(choice.ids)

    def awaits_prompt(self, request: RequestState) -> bool:
        prompt, opened = request.prompt, request.opened
        return prompt is not None and opened is not None and len(prompt.ids) < opened.prompt_tokens

    def waits_for_open(self, request: RequestState) -> bool:
        return request.opened is None

    def raises_epoch(self, request: RequestState, fence: m.Fence) -> bool:
        return fence.epoch > request.epoch

    def clear_held(self, request: RequestState) -> None:
        request.held.clear()

    def is_open_for_entries(self, request: RequestState) -> bool:
        return request.terminal is None

    def remembers_early_end(self) -> bool:
        return True

    def keeps_attached_reply(self) -> bool:
        return True

    # ------------------------------------------------------------ the fold

    def apply(self, entry: m.LogEntry, stamp: float) -> list[Effect]:
        """Folds one entry, stored at `stamp` (seconds, the stream's clock); returns what it changed, in order."""
        effects: list[Effect] = []
        if isinstance(entry, m.StepTokens):
            for tokens in entry.entries:
                known = self.requests.get(tokens.key)
                if known is None:
                    known = self.requests[tokens.key] = RequestState(tokens.key)
                if known.terminal is None or known.opened is None:
                    known.touched = stamp
                if not self._usual(known, tokens, effects):
                    self._tokens(known, tokens, effects)
            return effects
        request = self.requests.get(entry.key)
        if request is None:
            request = self.requests[entry.key] = RequestState(entry.key)
        if request.terminal is None or request.opened is None:
            request.touched = stamp
        match entry:
            case m.Open():
                self._open(request, entry, effects)
            case m.Attach():
                request.reply = entry.reply
                effects.append(Attached(entry.key, entry.reply))
            case m.Fence():
                self._fence(request, entry, effects)
            case m.End():
                self._end(request, entry, effects)
        return effects

    def _open(self, request: RequestState, entry: m.Open, effects: list[Effect]) -> None:
        if request.opened is not None:
            return  # a scheduler repeats OPEN when it does not know whether the first was stored
        request.opened, request.req_seq = entry, entry.req_seq
        request.choices = [Choice() for _ in range(entry.choices)]
        request.prompt = Choice() if entry.prompt_logprobs else None
        if request.reply is None or not self.keeps_attached_reply():
            request.reply = entry.reply
        effects.append(Opened(entry.key))
        if request.terminal is not None:
            effects.append(Ended(entry.key, request.terminal))
        if request.prompt is not None:
            self._commit_held(request, m.PROMPT, request.prompt, effects)
        self._commit_held_choices(request, effects)

    def _fence(self, request: RequestState, entry: m.Fence, effects: list[Effect]) -> None:
        if not self.raises_epoch(request, entry):
            return
        request.epoch = entry.epoch
        self.clear_held(request)
        for choice in (*request.choices, *([request.prompt] if request.prompt is not None else [])):
            choice.base = len(choice.ids)
        effects.append(Fenced(entry.key, entry.epoch))

    def _end(self, request: RequestState, entry: m.End, effects: list[Effect]) -> None:
        if not self.is_open_for_entries(request):
            return
        if request.opened is None and not self.remembers_early_end():
            return
        if entry.choice >= 0:
            if entry.choice < len(request.choices) and request.choices[entry.choice].finish is None:
                self._finish_choice(request, entry.choice, "stop_string", entry.stop, entry.length, effects)
            return
        self._terminate(request, Terminal(entry.reason, entry.failure), effects)

    @staticmethod
    def _usual(request: RequestState, tokens: m.Tokens, effects: list[Effect]) -> bool:
        """What `_tokens` does with the next tokens of a choice that goes on, which nearly all entries are: without asking the rules,
        as none of them has anything to say about such an entry. False, and nothing is done, for any other."""
        key, index, epoch, position, data, finish, _, logprobs, _, cached = tokens
        if (
            finish is not None
            or cached
            or epoch != request.epoch
            or request.held
            or request.terminal is not None
            or request.prompt is not None
            or not 0 <= index < len(request.choices)  # there are none before OPEN
        ):
            return False
        choice = request.choices[index]
        if choice.finish is not None or position != len(choice.ids) or not data:
            return False
        ids = unpack_ids(data)
        effects.append(Committed(key, index, position, ids, logprobs))
        choice.ids += ids
        return True

    def _tokens(self, request: RequestState, tokens: m.Tokens, effects: list[Effect]) -> None:
        if not self.is_open_for_entries(request) or not self.is_current(request, tokens):
            return
        if self.waits_for_open(request):
            request.held[tokens.choice, tokens.position] = tokens
            return
        index = tokens.choice
        of_prompt = index < 0 and index == m.PROMPT and request.prompt is not None
        if not of_prompt and not 0 <= index < len(request.choices):
            return
        choice = request.prompt if of_prompt else request.choices[index]
        assert choice is not None
        if choice.finish is not None or self.is_duplicate(choice, tokens):
            return
        fails = tokens.finish is not None and tokens.finish not in FINISHED
        if self.holds(choice, tokens) or (not of_prompt and not fails and self.awaits_prompt(request)):
            request.held[index, tokens.position] = tokens
            return
        self._commit(request, choice, tokens, effects)
        if request.held:
            self._commit_held(request, index, choice, effects)
            if of_prompt:
                self._commit_held_choices(request, effects)

    def _commit_held_choices(self, request: RequestState, effects: list[Effect]) -> None:
        for index, choice in enumerate(request.choices):
            if not self.awaits_prompt(request):
                self._commit_held(request, index, choice, effects)

    def _commit_held(self, request: RequestState, index: int, choice: Choice, effects: list[Effect]) -> None:
        while (
            request.terminal is None
            and choice.finish is None
            and (waiting := request.held.pop((index, len(choice.ids)), None)) is not None
        ):
            self._commit(request, choice, waiting, effects)

    def _commit(self, request: RequestState, choice: Choice, tokens: m.Tokens, effects: list[Effect]) -> None:
        ids = unpack_ids(tokens.ids)
        request.cached = max(request.cached, tokens.cached)
        if ids:
            effects.append(Committed(request.key, tokens.choice, len(choice.ids), ids, tokens.logprobs))
            choice.ids.extend(ids)
        if tokens.finish is None:
            return
        if tokens.finish in FINISHED:
            self._finish_choice(request, tokens.choice, tokens.finish, tokens.stop, len(choice.ids), effects)
        else:
            failure = tokens.failure or m.Failure("internal", f"the worker reported {tokens.finish!r} without a reason")
            self._terminate(request, Terminal("error", failure), effects)

    def _finish_choice(
        self, request: RequestState, index: int, finish: str, stop: str | int | None, length: int, effects: list[Effect]
    ) -> None:
        choice = request.choices[index]
        choice.finish, choice.stop, choice.length = finish, stop, length
        effects.append(ChoiceFinished(request.key, index))
        if all(c.finish is not None for c in request.choices):
            self._terminate(request, Terminal("finished"), effects)

    def _terminate(self, request: RequestState, terminal: Terminal, effects: list[Effect]) -> None:
        request.terminal = terminal
        request.held.clear()
        if request.opened is not None:  # else OPEN reports it
            effects.append(Ended(request.key, terminal))

    # ------------------------------------------------------------ forgetting, and snapshots

    def prune(self, before: float) -> list[str]:
        """Forgets what ended (or never was opened) and was last touched before the stream time `before`; returns the keys."""
        gone = [key for key, request in self.requests.items() if _is_over(request, before)]
        for key in gone:
            del self.requests[key]
        return gone

    def make_way(self, opened: m.Open, before: float) -> bool:
        """`prune` for the id of a request that is about to be opened, unless it is that very request, opened again. Returns whether
        there was something to forget."""
        request = self.requests.get(opened.key)
        if request is None or not _is_over(request, before):
            return False
        if request.opened is not None and request.req_seq == opened.req_seq:
            return False
        del self.requests[opened.key]
        return True

    def snapshot(self) -> bytes:
        """The whole state as bytes; `restore` of it, followed by the entries after it, equals folding everything."""
        rows = []
        for r in self.requests.values():
            choices = [(c.ids, c.base, c.finish, c.stop, c.length) for c in r.choices]
            held = list(r.held.values())
            prompt = None if r.prompt is None else (r.prompt.ids, r.prompt.base)
            rows.append(
                (r.key, r.opened, r.reply, r.epoch, choices, held, r.terminal, r.touched, prompt, r.req_seq, r.cached)
            )
        data: bytes = msgpack.packb(rows)
        return data

    @classmethod
    def restore(cls, data: bytes) -> PartitionFold:
        fold = cls()
        for key, opened, reply, epoch, choices, held, terminal, touched, *added in msgpack.unpackb(
            data, strict_map_key=False
        ):
            request = RequestState(key, epoch=epoch, touched=touched)
            request.opened = rebuild(m.Open, opened) if opened is not None else None
            request.reply = rebuild(m.ReplyTo, reply) if reply is not None else None
            request.choices = [Choice(*row[:5]) for row in choices]
            request.req_seq = (
                added[1] if len(added) > 1 else request.opened.req_seq if request.opened is not None else 0
            )
            request.cached = added[2] if len(added) > 2 else 0
            if added and added[0] is not None:
                request.prompt = Choice(*added[0][:2])
            for row in held:
                tokens = rebuild(m.Tokens, row)
                request.held[tokens.choice, tokens.position] = tokens
            if terminal is not None:
                reason, failure, *_ = terminal
                request.terminal = Terminal(reason, rebuild(m.Failure, failure) if failure is not None else None)
            fold.requests[key] = request
        return fold


def _is_over(request: RequestState, before: float) -> bool:
    return request.touched < before and (request.terminal is not None or request.opened is None)
