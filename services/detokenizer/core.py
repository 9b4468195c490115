"""One partition without its messaging: entries in, answers that have news out. No I/O, no clock but the stream's."""

from __future__ import annotations

from collections.abc import Iterable

from services.detokenizer.answer import BEGINNING, Answer, Cursor
from services.detokenizer.decoding import NewDecoding
from services.detokenizer.recorder import Recorder
from services.detokenizer.snapshot import Snapshot, lighten, pack
from shared import tokenlog
from shared.logging import note_request
from shared.messages import PROMPT, LogEntry, Open, ReplyTo
from shared.tokenlog import PartitionFold, RequestState

# Of a request that ended longer ago than this when its partition was taken over, nothing is sent unasked: whoever still
# waits for it has asked for a replay.
STALE = 10.0


class PartitionCore:
    """State of one partition at `seq`, stream time `stamp`.

    answers    what clients are told, by request key: those that run, and those that ended but are not archived yet
    settled    keys of ended requests whose end the schedulers know of (tombstone), not archived yet
    archived   keys of ended requests of which only the fold's minimum is left here
    fenced     keys with news for those that asked for a prefix; taken by the caller
    recalled   (key, reply) of archived requests that somebody attached to; taken by the caller
    """

    def __init__(self, new_decoding: NewDecoding, snapshot: Snapshot | None = None) -> None:
        if snapshot is None:
            snapshot = Snapshot(0, 0.0, PartitionFold(), {}, set(), set())
        self.seq, self.stamp, self.fold, self.answers, self.settled, self.archived = snapshot
        self.tokens = 0
        self.recorder: Recorder | None = None  # while the partition is served
        self.fenced: list[str] = []
        self.recalled: list[tuple[str, ReplyTo]] = []
        self._new_decoding = new_decoding
        self._dirty: dict[str, Answer] = dict(self.answers)
        self._attaching: dict[tuple[str, str], dict[int, Cursor]] = {}

    def apply(self, seq: int, stamp: float, entry: LogEntry) -> None:
        answers, dirty, recorder = self.answers, self._dirty, self.recorder
        # Most requests of a step had their last tokens in the same step before: equal times are recorded together.
        last, times = -1.0, 0
        for effect in self.fold.apply(entry, stamp):
            kind = type(effect)
            key = effect.key
            if kind is tokenlog.Committed:
                answer = dirty[key] = answers[key]
                try:  # not by `attempt`: a call more for every token
                    answer.commit(effect, stamp)  # type: ignore[arg-type]
                except Exception as error:
                    answer.break_off(error)
                if effect.choice == PROMPT:  # type: ignore[union-attr]
                    continue
                self.tokens += len(effect.ids)  # type: ignore[union-attr]
                if recorder is not None:
                    before = answer.last_at
                    answer.last_at = stamp
                    if before == last:
                        times += 1
                    elif not before:
                        recorder.began(answer)
                    elif before != stamp:  # else it is another choice of the same step
                        if times:
                            recorder.inter_token.observe(stamp - last, times)
                        last, times = before, 1
            elif kind is tokenlog.ChoiceFinished:
                answer = dirty[key] = answers[key]
                answer.attempt(answer.finish, effect.choice)  # type: ignore[union-attr]
            elif kind is tokenlog.Opened:
                answer = dirty[key] = answers[key] = Answer(self.fold.requests[key], self._new_decoding, stamp)
                note_request(key, 1, answer.opened.trace)
            elif kind is tokenlog.Ended:
                answer = dirty[key] = answers[key]
                answer.attempt(answer.end, stamp)
                self.fenced.append(key)
            elif kind is tokenlog.Fenced:
                self.fenced.append(key)
                note_request(key, effect.epoch)  # type: ignore[union-attr]
                if (migrated := answers.get(key)) is not None:
                    migrated.fences.append((effect.epoch, stamp))  # type: ignore[union-attr]
                if recorder is not None:
                    recorder.fenced()
            elif kind is tokenlog.Attached:
                self._attached(key, effect.reply)  # type: ignore[union-attr]
        if times:
            recorder.inter_token.observe(stamp - last, times)  # type: ignore[union-attr]
        self.skip(seq, stamp)

    def skip(self, seq: int, stamp: float) -> None:
        """An entry that is no message of this protocol."""
        self.seq = seq
        self.stamp = max(self.stamp, stamp)

    def _attached(self, key: str, reply: ReplyTo) -> None:
        if key in self.archived:
            self.recalled.append((key, reply))
        elif (answer := self.answers.get(key)) is not None:  # else OPEN comes later and finds the reply
            answer.rewind(self._attaching.pop((key, reply.subject), {}))
            self._dirty[key] = answer

    def expect_attach(self, answer: Answer, reply: ReplyTo, cursors: dict[int, Cursor]) -> None:
        """A replay answer went out from the cursors to now; when the ATTACH that is under way is folded, events go on from here."""
        now = {}
        for number, track in answer.tracks.items():
            position, offset = cursors.get(number, BEGINNING)
            now[number] = (max(track.stream.shown, position), max(track.stream.chars, offset))
        self._attaching[answer.state.key, reply.subject] = now

    def take_dirty(self) -> Iterable[Answer]:
        """Answers that may have news since the last call."""
        dirty, self._dirty = self._dirty, {}
        return dirty.values()

    def drop_stale(self) -> None:
        """After catching up: what ended long ago is not news."""
        for answer in self._dirty.values():
            if answer.ended and self.stamp - answer.ended_at > STALE:
                answer.mark_sent()

    # ------------------------------------------------ the end of requests

    def request(self, key: str) -> RequestState | None:
        return self.fold.requests.get(key)

    def archive(self, answer: Answer) -> None:
        """The ended request is stored elsewhere now."""
        key = answer.state.key
        if self.answers.get(key) is answer:  # else a new request has the id
            del self.answers[key]
            self._dirty.pop(key, None)
            self.settled.discard(key)
            self.archived.add(key)
            lighten(answer.state)

    def prune(self, window: float) -> None:
        """Forgets what ended more than `window` seconds of stream time ago."""
        for key in self.fold.prune(self.stamp - window):
            self._forget(key)
        self._attaching = {at: cursors for at, cursors in self._attaching.items() if at[0] in self.answers}

    def make_way(self, opened: Open, before: float) -> bool:
        """An OPEN comes: what had the id before, and ended before the stream time `before`, is another request. It need not be pruned
        yet: stream time stands still while nothing is written. Returns whether there was something to forget."""
        forgotten = self.fold.make_way(opened, before)
        if forgotten:
            self._forget(opened.key)
        return forgotten

    def _forget(self, key: str) -> None:
        self.answers.pop(key, None)
        self._dirty.pop(key, None)
        self.settled.discard(key)
        self.archived.discard(key)

    def snapshot(self) -> bytes:
        return pack(self.seq, self.stamp, self.fold, self.answers, self.settled, self.archived)
