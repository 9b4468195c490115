"""What the client of one request is told: a function of the folded log, so that every owner tells the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from services.detokenizer.decoding import NewDecoding
from services.detokenizer.stream import ChoiceStream
from shared import api
from shared.codec import unpack_ids
from shared.messages import Failure, TokenLogprobs
from shared.subjects import split_request_key
from shared.tokenlog import Committed, RequestState
from shared.tool_calls import MARKERS, parse

# Most of one event: so that a few of them, with log-probabilities, fit into a message.
EVENT_IDS = 512
EVENT_CHARS = 8192

_STOP_ID_FINISHES = frozenset({"stop", "stop_token"})


# How much of a choice somebody has: ids and characters.
Cursor = tuple[int, int]
BEGINNING: Cursor = (0, 0)


class Answer:
    """Text and events of one request whose OPEN has been folded.

    sent            how much of each choice went to the reply subject
    terminal_sent   so did the terminal event
    declared        choices whose stop string has been reported to the log by this process
    opened_at, first_at, ended_at   stream time of OPEN, of the first tokens, of the end; seconds, 0 if not yet
    fences          (epoch, stream time) of its migrations, as far as this process has folded them
    last_at         stream time of the last tokens that were recorded (recorder.py), 0 if none were
    """

    def __init__(self, state: RequestState, new_decoding: NewDecoding, opened_at: float) -> None:
        opened = state.opened
        assert opened is not None
        self.state = state
        self.opened = opened
        self.tenant, self.id = split_request_key(state.key)
        shown = MARKERS.get(opened.tool_format, ())
        self.streams = [ChoiceStream(new_decoding(shown), opened.stop) for _ in state.choices]
        self.logprobs: list[list[TokenLogprobs]] | None = [[] for _ in state.choices] if opened.logprobs else None
        self.hidden = [0] * len(state.choices)  # 1: the last id is a stop id, which leaves no text
        self.sent: list[Cursor] = [BEGINNING] * len(state.choices)
        self.terminal_sent = False
        self.declared: set[int] = set()
        self.opened_at = opened_at
        self.first_at = 0.0
        self.ended_at = 0.0
        self.fences: list[tuple[int, float]] = []
        self.last_at = 0.0

    # ------------------------------------------------ from the fold

    def commit(self, effect: Committed, stamp: float) -> None:
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
        for stream in self.streams:
            stream.flush()

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
        events: list[dict[str, Any]] = []
        state, sent = self.state, self.sent
        streamed = state.reply is None or state.reply.stream
        if streamed:
            for index, stream in enumerate(self.streams):
                position, offset = sent[index]
                shown, chars = stream.shown, stream.chars
                if position >= shown and offset >= chars:
                    continue
                if shown - position <= EVENT_IDS and chars - offset <= EVENT_CHARS:
                    events.append(self._event(index, position, shown, stream.text_from(offset), offset))
                else:
                    events.extend(self.news(index, sent[index]))
                sent[index] = (shown, chars)
        if state.terminal is not None and not self.terminal_sent:
            self.terminal_sent = True
            events.append(self.terminal_event(streamed))
        return events

    def mark_sent(self) -> None:
        """Everything up to here went out before (by the partition's last owner)."""
        self.sent = [(stream.shown, stream.chars) for stream in self.streams]
        self.terminal_sent = self.ended

    def rewind(self, cursors: dict[int, Cursor]) -> None:
        """Send again from the cursors on (default: the beginning), and how it ended."""
        self.sent = [cursors.get(index, BEGINNING) for index in range(len(self.streams))]
        self.terminal_sent = False

    def news(self, index: int, cursor: Cursor) -> Iterator[dict[str, Any]]:
        """Events of one choice from the cursor to now; a cursor beyond that gets nothing."""
        stream = self.streams[index]
        position, offset = cursor
        text = stream.text_from(offset)
        at = 0
        while position < stream.shown or at < len(text):
            end = min(stream.shown, position + EVENT_IDS)
            piece = text[at : at + EVENT_CHARS]
            yield self._event(index, position, end, piece, offset + at)
            position = max(end, position)
            at += len(piece)

    def _event(self, index: int, position: int, end: int, text: str, offset: int) -> dict[str, Any]:
        ids = self.state.choices[index].ids[position:end]
        return api.tokens_event(self.id, index, position, ids, text, offset, self._logprobs(index, position, end))

    def replay(self, cursors: dict[int, Cursor], stream: bool = True) -> list[dict[str, Any]]:
        """Everything from the cursors on; at least one event, so that the asker knows that the request lives."""
        events: list[dict[str, Any]] = []
        if stream:
            for index in range(len(self.streams)):
                events.extend(self.news(index, cursors.get(index, BEGINNING)))
        if self.ended:
            events.append(self.terminal_event(stream))
        elif not events:
            events.append(api.tokens_event(self.id, 0, *self._empty_at(cursors.get(0, BEGINNING))))
        return events

    def sign_of_life(self) -> dict[str, Any]:
        """An event without news."""
        return api.tokens_event(self.id, 0, *self._empty_at(self.sent[0]))

    @staticmethod
    def _empty_at(cursor: Cursor) -> tuple[int, list[int], str, int]:
        position, offset = cursor
        return position, [], "", offset

    def terminal_event(self, stream: bool) -> dict[str, Any]:
        """`stream` False puts text and ids of the choices into the event."""
        terminal, opened = self.state.terminal, self.opened
        assert terminal is not None
        if terminal.reason == "error":
            failure = terminal.failure or Failure("internal", "the request failed without a reason")
            return api.error_event(self.id, failure, metadata=opened.metadata)
        if terminal.reason == "cancelled":
            return api.cancelled_event(
                self.id,
                prompt_tokens=opened.prompt_tokens,
                completion_tokens=self.completion_tokens,
                metadata=opened.metadata,
            )
        return api.finished_event(
            self.id,
            [self._choice_end(index, stream) for index in range(len(self.streams))],
            prompt_tokens=opened.prompt_tokens,
            completion_tokens=self.completion_tokens,
            timings=self.timings(),
            metadata=opened.metadata,
        )

    def _choice_end(self, index: int, stream: bool) -> dict[str, Any]:
        """A stop string in the text decides, even if the log knows another finish: "length" may come in the same entry as the token
        that completes the stop string, or overtake the owner's END, and what the client is told must not depend on that race."""
        choice, text = self.state.choices[index], self.streams[index]
        stop = text.matched if text.matched is not None else choice.stop
        end: dict[str, Any] = dict(
            choice=index,
            finish_reason="length" if choice.finish == "length" and text.matched is None else "stop",
            stop=stop,
            tokens=text.shown,
            chars=text.chars,
        )
        if self.opened.tool_format in MARKERS:
            end |= self._calls(index, end["finish_reason"])
        if not stream:
            end |= dict(ids=choice.ids[: text.shown], text=text.text)
            if (logprobs := self._logprobs(index, 0, text.shown)) is not None:
                end["logprobs"] = logprobs
        return end

    def _calls(self, index: int, reason: str) -> dict[str, Any]:
        """Of a choice that calls tools, what the end says about it."""
        content, calls = parse(self.opened.tool_format, self.streams[index].text, self.id, index)
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

    def _logprobs(self, index: int, start: int, end: int) -> list[dict[str, Any]] | None:
        if self.logprobs is None:
            return None
        ids = self.state.choices[index].ids[start:end]
        return [
            dict(
                id=token,
                logprob=row.chosen,
                top=[list(pair) for pair in zip(unpack_ids(row.top_ids), row.top, strict=True)],
            )
            for token, row in zip(ids, self.logprobs[index][start:end], strict=False)
        ]

    # ------------------------------------------------ snapshots

    def row(self) -> tuple[Any, ...]:
        """What the fold's own state does not tell, as msgpack takes it."""
        return (self.opened_at, self.first_at, self.ended_at, self.hidden, self.logprobs)

    @classmethod
    def restore(cls, state: RequestState, new_decoding: NewDecoding, row: list[Any]) -> Answer:
        answer = cls(state, new_decoding, row[0])
        _, answer.first_at, answer.ended_at, answer.hidden, logprobs = row
        if logprobs is not None:
            answer.logprobs = [[TokenLogprobs(c, ids, tuple(top)) for c, ids, top in rows] for rows in logprobs]
        for choice, stream, hidden in zip(state.choices, answer.streams, answer.hidden, strict=True):
            stream.feed(choice.ids, hidden)
            if choice.finish is not None or answer.ended:
                stream.flush()
        answer.mark_sent()
        return answer
