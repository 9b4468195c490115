"""What the client of one request is told: a function of the folded log, so that every owner tells the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import structlog

from services.detokenizer.decoding import Decoding, NewDecoding
from services.detokenizer.stream import ChoiceStream
from services.detokenizer.track import NoText, Track, mean_logprob
from shared import api
from shared.codec import rebuild, unpack_ids
from shared.messages import PROMPT, Failure, TokenLogprobs
from shared.subjects import split_request_key
from shared.tokenlog import Committed, RequestState
from shared.tool_calls import MARKERS, parse

# Most of one event: so that a few of them, with log-probabilities, fit into a message.
EVENT_IDS = 512
EVENT_CHARS = 8192

log = structlog.get_logger()

_STOP_ID_FINISHES = frozenset({"stop", "stop_token"})

# Of an answer that could not be made of its tokens.
BROKEN = Failure("internal", "the detokenizer failed at this answer")

# How much of a choice somebody has: ids and characters.
Cursor = tuple[int, int]
BEGINNING: Cursor = (0, 0)


class Answer:
    """Text and events of one request whose OPEN has been folded.

    tracks          what the client is told of, by the number that it knows: all choices, or with `best` the likeliest once the request
                    has finished; the prompt, if wanted, before them
    sent            how much of each track went to the reply subject
    terminal_sent   so did the terminal event
    declared        choices whose stop string has been reported to the log by this process
    opened_at, first_at, ended_at   stream time of OPEN, of the first tokens, of the end; seconds, 0 if not yet
    fences          (epoch, stream time) of its migrations, as far as this process has folded them
    last_at         stream time of the last tokens that were recorded (recorder.py), 0 if none were
    broken          decoding, matching or parsing it raised: the client is told nothing more but that, when the log knows of it
    """

    def __init__(self, state: RequestState, new_decoding: NewDecoding, opened_at: float) -> None:
        opened = state.opened
        assert opened is not None
        self.state = state
        self.opened = opened
        self.tenant, self.id = split_request_key(state.key)
        self.broken = self._declared_broken = False
        self.attempt(self._build, new_decoding)
        self.hidden = [0] * len(state.choices)  # 1: the last id is a stop id, which leaves no text
        self.sent: dict[int, Cursor] = {}
        self.terminal_sent = False
        self.declared: set[int] = set()
        self.opened_at = opened_at
        self.first_at = 0.0
        self.ended_at = 0.0
        self.fences: list[tuple[int, float]] = []
        self.last_at = 0.0

    def _build(self, new_decoding: NewDecoding) -> None:
        state, opened = self.state, self.opened
        echoed = unpack_ids(opened.prompt_ids)
        marks = MARKERS.get(opened.tool_format, ())
        before = echoed if opened.max_tokens else []
        self.streams = [ChoiceStream(_after(new_decoding(marks), before), opened.stop) for _ in state.choices]
        keeps_logprobs = opened.logprobs or opened.best > 0
        self.logprobs: list[list[TokenLogprobs]] | None = [[] for _ in state.choices] if keeps_logprobs else None
        self.prompt: Track | None = None
        if echoed or state.prompt is not None:
            stream = ChoiceStream(new_decoding(()) if echoed else NoText())
            if state.prompt is None:
                self.prompt = Track(stream, echoed, None, PROMPT)
                stream.feed(echoed)
            else:
                self.prompt = Track(stream, state.prompt.ids, [], PROMPT)
        self.tracks: dict[int, Track] = {} if self.prompt is None else {PROMPT: self.prompt}
        if not opened.best:
            self.tracks |= {index: self._track(index) for index in range(len(self.streams))}
        self._called: dict[int, dict[str, Any]] = {}  # what the end says of calls, by track

    def attempt(self, what: Callable[..., None], *args: Any) -> None:
        try:
            what(*args)
        except Exception as error:
            self.break_off(error)

    def break_off(self, error: Exception) -> None:
        """What raised would raise again with every owner of the partition: this answer fails, and no other."""
        log.error("answer_failed", request_id=self.state.key, exc_info=error)
        self.broken = True
        self.streams = [ChoiceStream(NoText()) for _ in self.state.choices]
        self.tracks, self.prompt, self.logprobs = {}, None, None

    def _track(self, index: int) -> Track:
        logprobs = self.logprobs[index] if self.logprobs is not None and self.opened.logprobs else None
        return Track(self.streams[index], self.state.choices[index].ids, logprobs, index)

    def _rank(self) -> None:
        """Of a request that has finished, the client is now told of its likeliest choices."""
        assert self.logprobs is not None
        means = [mean_logprob(self._track(i)._replace(logprobs=rows)) for i, rows in enumerate(self.logprobs)]
        best = sorted(range(len(means)), key=lambda index: -means[index])[: self.opened.best]
        self.tracks |= {number: self._track(index) for number, index in enumerate(best)}

    # ------------------------------------------------ from the fold

    def commit(self, effect: Committed, stamp: float) -> None:
        if effect.choice == PROMPT:
            if self.broken:
                return
            assert self.prompt is not None and self.prompt.logprobs is not None
            self.prompt.stream.feed(effect.ids)
            self.prompt.logprobs.extend(effect.logprobs or ())
            return
        if not self.first_at:
            self.first_at = stamp
        index, ids = effect.choice, effect.ids
        choice = self.state.choices[index]
        hidden = 0
        if (
            choice.finish in _STOP_ID_FINISHES
            and choice.stop == ids[-1]
            and effect.position + len(ids) == len(choice.ids)
        ):
            hidden = self.hidden[index] = 1
        self.streams[index].feed(ids, hidden)
        if self.logprobs is not None:
            self.logprobs[index].extend(effect.logprobs or ())

    def finish(self, index: int) -> None:
        self.streams[index].flush()

    def end(self, stamp: float) -> None:
        self.ended_at = stamp
        self._close()

    def _close(self) -> None:
        if self.broken:
            return
        for stream in self.streams:
            stream.flush()
        if self.prompt is not None and self.opened.max_tokens == 0:
            self.prompt.stream.flush()  # else the choices go on with what is incomplete of it
        if self.opened.best and self.state.terminal is not None and self.state.terminal.reason == "finished":
            self._rank()

    # ------------------------------------------------ what is known

    @property
    def ended(self) -> bool:
        return self.state.terminal is not None

    @property
    def done(self) -> tuple[int, ...]:
        """Choices that need no more tokens, those whose stop string the log has not heard of included."""
        return tuple(
            index
            for index, (choice, stream) in enumerate(zip(self.state.choices, self.streams, strict=True))
            if choice.finish is not None or stream.matched is not None
        )

    @property
    def completion_tokens(self) -> int:
        return sum(stream.shown for stream in self.streams)

    def undeclared_failure(self) -> Failure | None:
        """What the log must be told of a broken answer; once."""
        if not self.broken or self._declared_broken or self.ended:
            return None
        self._declared_broken = True
        return BROKEN

    def undeclared_stops(self) -> list[tuple[int, str, int]]:
        """(choice, stop string, tokens that count) for what the log must be told; each is returned once."""
        found = []
        for index, stream in enumerate(self.streams):
            if stream.matched is not None and index not in self.declared and self.state.choices[index].finish is None:
                self.declared.add(index)
                found.append((index, stream.matched, stream.shown))
        return found

    # ------------------------------------------------ events

    def unsent(self) -> list[dict[str, Any]]:
        """Events for the reply subject since the last call."""
        terminal_sent = self.terminal_sent
        try:
            return self._unsent()
        except Exception as error:
            self.break_off(error)
            self.terminal_sent = terminal_sent
            return self._unsent()

    def _unsent(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        state, sent = self.state, self.sent
        streamed = state.reply is None or state.reply.stream
        if streamed:
            for number, track in self.tracks.items():
                position, offset = sent.get(number, BEGINNING)
                stream = track.stream
                shown, chars = stream.shown, stream.chars
                if position >= shown and offset >= chars:
                    continue
                if shown - position <= EVENT_IDS and chars - offset <= EVENT_CHARS:
                    events.append(self._event(number, position, shown, stream.text_from(offset), offset))
                else:
                    events.extend(self.news(number, (position, offset)))
                sent[number] = (shown, chars)
        if state.terminal is not None and not self.terminal_sent:
            self.terminal_sent = True
            events.append(self.terminal_event(streamed))
        return events

    def mark_sent(self) -> None:
        """Everything up to here went out before (by the partition's last owner)."""
        self.sent = {number: (track.stream.shown, track.stream.chars) for number, track in self.tracks.items()}
        self.terminal_sent = self.ended

    def rewind(self, cursors: dict[int, Cursor]) -> None:
        """Send again from the cursors on (default: the beginning), and how it ended."""
        self.sent = dict(cursors)
        self.terminal_sent = False

    def news(self, number: int, cursor: Cursor) -> Iterator[dict[str, Any]]:
        """Events of one track from the cursor to now; a cursor beyond that gets nothing."""
        stream = self.tracks[number].stream
        position, offset = cursor
        text = stream.text_from(offset)
        at = 0
        while position < stream.shown or at < len(text):
            end = min(stream.shown, position + EVENT_IDS)
            piece = text[at : at + EVENT_CHARS]
            yield self._event(number, position, end, piece, offset + at)
            position = max(end, position)
            at += len(piece)

    def _event(self, number: int, position: int, end: int, text: str, offset: int) -> dict[str, Any]:
        track = self.tracks[number]
        ids, logprobs = track.ids[position:end], track.logprob_rows(position, end)
        return api.tokens_event(self.id, number, position, ids, text, offset, logprobs)

    def replay(self, cursors: dict[int, Cursor], stream: bool = True) -> list[dict[str, Any]]:
        """Everything from the cursors on; at least one event, so that the asker knows that the request lives."""
        try:
            return self._replay(cursors, stream)
        except Exception as error:
            self.break_off(error)
            return self._replay(cursors, stream)

    def _replay(self, cursors: dict[int, Cursor], stream: bool) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if stream:
            for number in self.tracks:
                events.extend(self.news(number, cursors.get(number, BEGINNING)))
        if self.ended:
            events.append(self.terminal_event(stream))
        elif not events:
            events.append(api.tokens_event(self.id, 0, *self._empty_at(cursors.get(0, BEGINNING))))
        return events

    def sign_of_life(self) -> dict[str, Any]:
        """An event without news."""
        return api.tokens_event(self.id, 0, *self._empty_at(self.sent.get(0, BEGINNING)))

    @staticmethod
    def _empty_at(cursor: Cursor) -> tuple[int, list[int], str, int]:
        position, offset = cursor
        return position, [], "", offset

    def terminal_event(self, stream: bool) -> dict[str, Any]:
        """`stream` False puts text and ids of the choices into the event."""
        terminal, opened = self.state.terminal, self.opened
        assert terminal is not None
        if self.broken:
            return api.error_event(self.id, BROKEN, metadata=opened.metadata)
        if terminal.reason == "error":
            failure = terminal.failure or Failure("internal", "the request failed without a reason")
            return api.error_event(self.id, failure, metadata=opened.metadata)
        if terminal.reason == "cancelled":
            return api.cancelled_event(
                self.id,
                prompt_tokens=opened.prompt_tokens,
                completion_tokens=self.completion_tokens,
                cached_tokens=self.state.cached,
                metadata=opened.metadata,
                choices=[dict(choice=n) | _lengths(track) for n, track in self.tracks.items() if n >= 0],
                prompt=None if self.prompt is None else _lengths(self.prompt),
            )
        return api.finished_event(
            self.id,
            [self._choice_end(number, stream) for number in self.tracks if number >= 0],
            prompt=None if self.prompt is None else _lengths(self.prompt) | ({} if stream else _whole(self.prompt)),
            prompt_tokens=opened.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_tokens=self.state.cached,
            timings=self.timings(),
            metadata=opened.metadata,
        )

    def _choice_end(self, number: int, stream: bool) -> dict[str, Any]:
        """A stop string in the text decides, even if the log knows another finish: "length" may come in the same entry as the token
        that completes the stop string, or overtake the owner's END, and what the client is told must not depend on that race."""
        track = self.tracks[number]
        choice, text = self.state.choices[track.index], track.stream
        stop = text.matched if text.matched is not None else choice.stop
        end: dict[str, Any] = dict(
            choice=number,
            finish_reason="length" if choice.finish == "length" and text.matched is None else "stop",
            stop=stop,
        )
        if self.opened.tool_format in MARKERS:
            end |= self._calls(number, end["finish_reason"])
        return end | _lengths(track) | ({} if stream else _whole(track))

    def _calls(self, number: int, reason: str) -> dict[str, Any]:
        """Of a choice that calls tools, what the end says about it."""
        if (known := self._called.get(number)) is None:
            known = self._called[number] = self._find_calls(number, reason)
        return known

    def _find_calls(self, number: int, reason: str) -> dict[str, Any]:
        content, calls = parse(self.opened.tool_format, self.tracks[number].stream.text, self.id, number)
        if not calls:
            return {}
        complete = any(call.error is None for call in calls)
        return dict(
            finish_reason="tool_calls" if complete and reason == "stop" else reason,
            tool_calls=[{k: v for k, v in call._asdict().items() if v is not None} for call in calls],
            content=content,
        )

    def timings(self) -> dict[str, float]:
        """ms; all but tokenize_ms count from the moment at which the request was accepted, on the stream's clock."""
        queue = self.opened.queue_ms
        return dict(
            tokenize_ms=round(self.opened.tokenize_ms, 3),
            queue_ms=round(queue, 3),
            ttft_ms=round(queue + ((self.first_at or self.ended_at) - self.opened_at) * 1000, 3),
            total_ms=round(queue + (self.ended_at - self.opened_at) * 1000, 3),
        )

    # ------------------------------------------------ snapshots

    def row(self) -> tuple[Any, ...]:
        """What the fold's own state does not tell, as msgpack takes it."""
        prompt = None if self.prompt is None else self.prompt.logprobs
        return (self.opened_at, self.first_at, self.ended_at, self.hidden, self.logprobs, prompt)

    @classmethod
    def restore(cls, state: RequestState, new_decoding: NewDecoding, row: list[Any]) -> Answer:
        answer = cls(state, new_decoding, row[0])
        _, answer.first_at, answer.ended_at, answer.hidden, logprobs, *added = row
        answer.attempt(answer._catch_up, logprobs, *added)
        answer.mark_sent()
        return answer

    def _catch_up(self, logprobs: list[Any] | None, prompt_logprobs: list[Any] | None = None) -> None:
        if self.broken:
            return
        for kept, rows in zip(self.logprobs or (), logprobs or (), strict=True):
            kept.extend(rebuild(TokenLogprobs, row) for row in rows)
        for choice, stream, hidden in zip(self.state.choices, self.streams, self.hidden, strict=True):
            stream.feed(choice.ids, hidden)
            if choice.finish is not None or self.ended:
                stream.flush()
        if self.prompt is not None and self.prompt.logprobs is not None:
            self.prompt.stream.feed(self.prompt.ids)
            self.prompt.logprobs.extend(rebuild(TokenLogprobs, row) for row in prompt_logprobs or ())
        if self.ended:
            self._close()


def _after(decoding: Decoding, ids: list[int]) -> Decoding:
    """The decoding of what comes after `ids`, so that the two texts together are the text of all."""
    if ids:
        decoding.feed(ids)
    return decoding


def _lengths(track: Track) -> dict[str, int]:
    return dict(tokens=track.stream.shown, chars=track.stream.chars)


def _whole(track: Track) -> dict[str, Any]:
    shown = track.stream.shown
    whole = dict(ids=track.ids[:shown], text=track.stream.text)
    rows = track.logprob_rows(0, shown)
    return whole if rows is None else whole | dict(logprobs=rows)
