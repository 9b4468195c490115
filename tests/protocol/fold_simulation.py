"""A simulation of the token log without a network or a clock: writers, readers and faults as one seeded sequence of choices.

What is real: the messages, their bytes and `PartitionFold`. What is simulated: the log (a list), schedulers that fence and re-target,
workers that generate, die, come back as zombies, lose, repeat and reorder their appends, cancels that overtake OPEN, clients that
attach elsewhere, owners that restart from a snapshot.

A token is a hash of (everything before it, the epoch that generated it), so that two epochs never agree and every committed sequence
can be checked token by token: it is right exactly if whoever generated a token had seen precisely the tokens before it.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field

from shared import codec
from shared import messages as m
from shared.tokenlog import Committed, Ended, Fenced, PartitionFold

MAX_TOKENS = 12
PROMPT_TOKENS = 5
FAULTY_STEPS = 160
QUIET_STEPS = 6000


class Broken(AssertionError):
    """An invariant does not hold."""


def next_token(prefix: list[int], epoch: int) -> int:
    return zlib.crc32(codec.pack_ids([*prefix, epoch])) & 0x7FFFFFFF


@dataclass
class Job:
    """A worker's run of one request in one epoch."""

    key: str
    epoch: int
    ids: list[list[int]]
    prompt: int  # tokens of the prompt that are told; PROMPT_TOKENS if they are not wanted

    @property
    def done(self) -> bool:
        return self.prompt >= PROMPT_TOKENS and all(len(ids) >= MAX_TOKENS for ids in self.ids)


@dataclass
class Worker:
    jobs: dict[tuple[str, int], Job] = field(default_factory=dict)
    outbox: list[bytes] = field(default_factory=list)


@dataclass
class Owner:
    """A reader of the log. `prefixes` is what it fixed inside each fence's fold."""

    fold: PartitionFold
    position: int = 0
    snapshot: tuple[int, bytes] | None = None
    prefixes: dict[tuple[str, int], tuple[tuple[list[int], ...], int]] = field(default_factory=dict)
    terminals: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Live:
    """The scheduler's view of a request. `wanted` is the prefix it waits for before it may run the epoch."""

    key: str
    choices: int
    prompt: bool = False  # its log-probabilities are wanted
    epoch: int = 1
    opened: bool = False
    stored: bool = False  # its OPEN is in the log; else it is still on its way
    ran: bool = False
    cancelled_at: int | None = None  # log position of the first END
    attached: str | None = None


class Simulation:
    def __init__(self, seed: int, fold: type[PartitionFold] = PartitionFold) -> None:
        self.random = random.Random(seed)
        self.fold_class = fold
        self.log: list[bytes] = []
        self.network: list[bytes] = []  # appends whose arrival time is open
        self.workers = [Worker() for _ in range(3)]
        self.owners = [Owner(fold()), Owner(fold())]
        self.requests = {
            f"t.r{i}": Live(f"t.r{i}", self.random.choice((1, 1, 2)), self.random.random() < 0.4) for i in range(3)
        }
        self.faulty = True

    # ------------------------------------------------ moves

    def append(self, message: m.LogEntry) -> None:
        """An append that is repeated until acknowledged: it lands now, and a copy of it may land at any later time."""
        data = codec.encode(message)
        if self.faulty and self.random.random() < 0.2:
            self.network.append(data)
        self.log.append(data)

    def open(self, r: Live) -> None:
        opened = m.Open(r.key, m.ReplyTo("inbox.first"), 1, PROMPT_TOKENS, MAX_TOKENS, choices=r.choices)
        opened = opened._replace(prompt_logprobs=r.prompt)
        r.opened = True
        if self.random.random() < 0.3:  # the order for the run does not wait until it is stored
            self.network.append(codec.encode(opened))
        else:
            self.append(opened)
            r.stored = True
        if self.faulty and self.random.random() < 0.1:  # the run is lost, or comes much later, beside its re-target
            return
        self.run(r, r.epoch, tuple([] for _ in range(r.choices)), 0)

    def run(self, r: Live, epoch: int, prefix: tuple[list[int], ...], prompt_done: int) -> None:
        r.ran = True
        worker = self.random.choice(self.workers)
        prompt = prompt_done if r.prompt else PROMPT_TOKENS
        worker.jobs[r.key, epoch] = Job(r.key, epoch, [list(ids) for ids in prefix], prompt)

    def fence(self, r: Live) -> None:
        if not r.stored:  # whoever fences has stored an OPEN before, or seen it stored
            opened = m.Open(r.key, m.ReplyTo("inbox.first"), 1, PROMPT_TOKENS, MAX_TOKENS, choices=r.choices)
            self.append(opened._replace(prompt_logprobs=r.prompt))
            r.stored = True
        r.epoch += 1
        r.ran = False
        self.append(m.Fence(r.key, r.epoch))

    def run_fenced(self, r: Live) -> None:
        """The prefix comes from an owner that has folded the fence, never from an earlier state."""
        for owner in self.owners:
            if (prefix := owner.prefixes.get((r.key, r.epoch))) is not None:
                self.run(r, r.epoch, *prefix)
                return

    def cancel(self, r: Live) -> None:
        self.append(m.End(r.key, "cancelled"))
        if r.cancelled_at is None:
            r.cancelled_at = len(self.log) - 1

    def attach(self, r: Live) -> None:
        if r.attached is None:
            self.append(m.Attach(r.key, m.ReplyTo("inbox.second")))
            r.attached = "inbox.second"

    def generate(self, worker: Worker) -> None:
        if not worker.jobs:
            return
        job = self.random.choice(list(worker.jobs.values()))
        if job.prompt < PROMPT_TOKENS:
            self.tell_prompt(worker, job)
        for choice, ids in enumerate(job.ids):
            if len(ids) >= MAX_TOKENS:
                continue
            position, count = len(ids), min(self.random.choice((1, 1, 3)), MAX_TOKENS - len(ids))
            for _ in range(count):
                ids.append(next_token(ids, job.epoch))
            finish = "length" if len(ids) == MAX_TOKENS else None
            tokens = m.Tokens(job.key, choice, job.epoch, position, codec.pack_ids(ids[position:]), finish)
            worker.outbox.append(codec.encode(m.StepTokens("w", 0, (tokens,))))
        if job.done:
            del worker.jobs[job.key, job.epoch]

    def tell_prompt(self, worker: Worker, job: Job) -> None:
        """Some more of the prompt, cut anywhere; the choices need not wait for it."""
        first, job.prompt = job.prompt, min(PROMPT_TOKENS, job.prompt + self.random.choice((1, 2, 5)))
        places = range(first, job.prompt)
        rows = tuple(m.TokenLogprobs(-1.0, b"", ()) for place in places)
        tokens = m.Tokens(job.key, m.PROMPT, job.epoch, first, codec.pack_ids(places), logprobs=rows)
        worker.outbox.append(codec.encode(m.StepTokens("w", 0, (tokens,))))

    def flush(self, worker: Worker) -> None:
        """One append of the outbox lands: out of order, or acknowledged to nobody, so that it is sent again."""
        if not worker.outbox:
            return
        at = self.random.randrange(min(4, len(worker.outbox))) if self.faulty else 0
        self.log.append(worker.outbox[at])
        if not (self.faulty and self.random.random() < 0.2):
            del worker.outbox[at]

    def die(self, worker: Worker) -> None:
        worker.jobs.clear()
        worker.outbox.clear()

    def late(self) -> None:
        if self.network:
            self.log.append(self.network.pop(self.random.randrange(len(self.network))))

    def read(self, owner: Owner) -> None:
        if owner.position >= len(self.log):
            return
        entry = codec.decode(self.log[owner.position])
        owner.position += 1
        for effect in owner.fold.apply(entry, float(owner.position)):
            if isinstance(effect, Fenced):
                state = owner.fold.requests[effect.key]
                owner.prefixes[effect.key, effect.epoch] = state.prefix, state.prompt_done
            elif isinstance(effect, Committed) and effect.choice != m.PROMPT:
                state = owner.fold.requests[effect.key]
                if state.prompt is not None and len(state.prompt.ids) < PROMPT_TOKENS:
                    raise Broken(f"{effect.key}: a token came before the prompt was told")
            elif isinstance(effect, Ended):
                owner.terminals.setdefault(effect.key, []).append(effect.terminal.reason)

    def restart(self, owner: Owner) -> None:
        """kill -9 of an owner: it comes back from its last snapshot, or from the beginning."""
        owner.position, state = owner.snapshot or (0, None)
        owner.fold = self.fold_class.restore(state) if state else self.fold_class()
        owner.fold.__class__ = self.fold_class
        owner.prefixes.clear()
        owner.terminals = {
            key: [r.terminal.reason] for key, r in owner.fold.requests.items() if r.terminal and r.opened is not None
        }

    # ------------------------------------------------ the run

    def step(self) -> None:
        r = self.random.choice(list(self.requests.values()))
        worker, owner = self.random.choice(self.workers), self.random.choice(self.owners)
        dice = self.random.random()
        if dice < 0.30:
            self.generate(worker)
        elif dice < 0.60:
            self.flush(worker)
        elif dice < 0.85:
            self.read(owner)
        elif dice < 0.90:
            if not r.opened:
                self.open(r)
            elif not r.ran:
                self.run_fenced(r) if r.epoch > 1 else self.fence(r)
        elif self.faulty:
            self.random.choice(
                (
                    lambda: r.opened and self.fence(r),
                    lambda: self.die(worker),
                    self.late,
                    lambda: self.restart(owner),
                    lambda: setattr(owner, "snapshot", (owner.position, owner.fold.snapshot())),
                    lambda: self.random.random() < 0.2 and self.cancel(r),
                    lambda: self.random.random() < 0.5 and self.attach(r),
                )
            )()
        else:
            self.late()

    def simulate(self) -> None:
        for _ in range(FAULTY_STEPS):
            self.step()
        self.faulty = False
        for r in self.requests.values():  # whoever died took its jobs along: one last re-target for all
            if r.opened:
                self.fence(r)
        while self.network:  # what was under way still lands, among the entries of the last epoch
            self.late()
            for _ in range(self.random.randrange(20)):
                self.step()
        for _ in range(QUIET_STEPS):
            self.step()
            if self.finished():
                break
        self.check()

    def finished(self) -> bool:
        return all(o.position == len(self.log) for o in self.owners) and all(
            len(o.terminals.get(key, ())) > 0 for o in self.owners for key in self.requests
        )

    def check(self) -> None:
        for owner in self.owners:
            while owner.position < len(self.log):
                self.read(owner)
        first, second = self.owners
        if first.fold.requests != second.fold.requests:
            raise Broken("two readers of one log disagree")
        for key, live in self.requests.items():
            state = first.fold.requests.get(key)
            if state is None or state.terminal is None:
                raise Broken(f"{key} never ended")
            for owner in self.owners:
                if len(owner.terminals.get(key, ())) != 1:
                    raise Broken(f"{key} has {len(owner.terminals.get(key, ()))} terminal events")
            self.check_text(key, state.choices)
            told = state.prompt.ids if state.prompt is not None else []
            if state.terminal.reason == "finished" and told != list(range(PROMPT_TOKENS)) * live.prompt:
                raise Broken(f"{key} finished, but of its prompt was told {told}")
            if state.terminal.reason == "finished" and any(len(c.ids) != MAX_TOKENS for c in state.choices):
                raise Broken(f"{key} finished with {[len(c.ids) for c in state.choices]} tokens")
            if live.attached and state.reply and state.reply.subject != live.attached:
                raise Broken(f"{key} forgot where its client is")
            self.check_cancel(key, live)

    def check_text(self, key: str, choices: list) -> None:  # type: ignore[type-arg]
        for choice in choices:
            epoch = 1
            for position, token in enumerate(choice.ids):
                while epoch <= self.requests[key].epoch and token != next_token(choice.ids[:position], epoch):
                    epoch += 1  # epochs only grow along a stream
                if epoch > self.requests[key].epoch:
                    raise Broken(f"{key}: token {position} was generated after another prefix")

    def check_cancel(self, key: str, live: Live) -> None:
        """A cancel that stands in the log before the request could have finished must have cancelled it."""
        if live.cancelled_at is None:
            return
        before = PartitionFold()
        for stamp, data in enumerate(self.log[: live.cancelled_at]):
            before.apply(codec.decode(data), float(stamp))
        known = before.requests.get(key)
        already = known is not None and known.terminal is not None
        reason = self.owners[0].fold.requests[key].terminal
        assert reason is not None
        if not already and reason.reason != "cancelled":
            raise Broken(f"{key} was cancelled, yet {reason.reason}")
