"""What comes of a request → the objects of OpenAI's API, whole or in chunks. No I/O.

JSON of chunks is put together by hand: they differ in a few values, and there is one for every token of every stream.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring as quote
from typing import Any, Protocol

from shared.client_stream import Delta
from shared.tool_calls import ToolCall, ToolCallDelta, ToolCallParser, parse

FINGERPRINT = "gorgon"
dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
LEAST_LOGPROB = -9999.0  # what OpenAI writes for a probability of zero


class Pieces(Protocol):
    """What token ids stand for: their bytes, and which of them leave no text (services/gateway/vocabulary.py)."""

    pieces: dict[int, bytes]
    special: set[int]


@dataclass(slots=True)
class Prompt:
    """What `echo` gives back of a prompt, as far as it has come."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any] | None] = field(default_factory=list)

    def extend(self, delta: Delta) -> None:
        self.text += delta.text
        self.ids += delta.ids
        for number, entry in enumerate(delta.logprobs or ()):
            self.logprobs.append(entry if delta.position + number else None)  # before the first token comes nothing


class Choice:
    """One choice as far as it has been rendered. `number` is its place in its request, `index` in the answer."""

    def __init__(self, index: int, request_id: str = "", number: int = 0, prompt: Prompt | None = None) -> None:
        self.index = index
        self.request_id = request_id
        self.number = number
        self.prompt = prompt
        self.begun = False
        self.text: list[str] = []
        self.ids: list[int] = []
        self.logprobs: list[dict[str, Any]] = []
        self.chars = 0  # of the text so far, for offsets
        self.parser: ToolCallParser | None = None


class Renderer:
    """Common to both endpoints. `include_usage`: every chunk says "usage": null but the last one."""

    object_name: str
    chunk_name: str
    id_prefix: str

    def __init__(self, base: str, created: int, model: str, *, include_usage: bool, logprobs: int | None) -> None:
        self._logprobs = logprobs
        self.with_logprobs = logprobs is not None
        self._identity: dict[str, Any] = dict(
            id=f"{self.id_prefix}{base}", object=self.object_name, created=created, model=model
        )
        head = self._identity | {"object": self.chunk_name, "system_fingerprint": FINGERPRINT}
        self._head = dump(head)[:-1] + ',"choices":['
        self._tail = '],"usage":null}' if include_usage else "]}"

    def chunk(self, choice: str, usage: dict[str, Any] | None = None) -> str:
        """`choice` is the JSON of one choice, or empty."""
        if usage is None:
            return f"{self._head}{choice}{self._tail}"
        return f'{self._head}{choice}],"usage":{dump(usage)}}}'

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return self._identity | dict(choices=choices, usage=usage, system_fingerprint=FINGERPRINT)

    # ------------------------------------------------ what the endpoints differ in

    def absorb(self, choice: Choice, delta: Delta) -> None:
        """Takes in what is not to be sent: a client that resumes has it, or it will be sent as a whole."""
        choice.begun = True
        choice.text.append(delta.text)
        choice.ids.extend(delta.ids)
        choice.chars += len(delta.text)
        choice.logprobs.extend(delta.logprobs or ())

    def delta(self, choice: Choice, delta: Delta, pieces: Pieces) -> str | None:
        """JSON of the choice in a chunk. Always in one, so that its event's id says exactly what the client has."""
        raise NotImplementedError

    def last(self, choice: Choice, reason: str, pieces: Pieces) -> str:
        """The same at the choice's end, with the finish reason."""
        raise NotImplementedError

    def choice(self, choice: Choice, reason: str, pieces: Pieces) -> dict[str, Any]:
        """The whole choice, of what was absorbed."""
        raise NotImplementedError


def _finite(logprob: float | None) -> float:
    return LEAST_LOGPROB if logprob is None else max(logprob, LEAST_LOGPROB)


# ---------------------------------------------------------------- chat


def chat_logprobs(entries: list[dict[str, Any]], pieces: Pieces, top: int) -> list[dict[str, Any]]:
    def one(token: int, logprob: float | None) -> dict[str, Any]:
        piece = pieces.pieces[token]
        return dict(
            token=piece.decode("utf-8", "replace"),
            logprob=_finite(logprob),
            bytes=list(piece),
        )

    return [
        one(e["id"], e["logprob"]) | {"top_logprobs": [one(token, logprob) for token, logprob in e["top"][:top]]}
        for e in entries
    ]


def _called(call: ToolCall) -> dict[str, Any]:
    return dict(id=call.id, type="function", function=dict(name=call.name, arguments=call.arguments))


def _call_news(call: ToolCallDelta) -> dict[str, Any]:
    """Id and name come once."""
    if call.name is None:
        return dict(index=call.index, function=dict(arguments=call.arguments))
    function = dict(name=call.name, arguments=call.arguments)
    return dict(index=call.index, id=call.id, type="function", function=function)


class ChatRenderer(Renderer):
    """`tool_format`: how the model writes its calls, "" if nobody looks for them (shared/tool_calls.py)."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl-"
    tool_format = ""

    def absorb(self, choice: Choice, delta: Delta) -> None:
        super().absorb(choice, delta)
        self._feed(choice, delta.text)

    def _feed(self, choice: Choice, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Content and news of calls in further text."""
        if not self.tool_format:
            return text, []
        if choice.parser is None:
            choice.parser = ToolCallParser(self.tool_format, choice.request_id, choice.number)
        content, calls = choice.parser.feed(text)
        return content, [_call_news(call) for call in calls]

    def delta(self, choice: Choice, delta: Delta, pieces: Pieces) -> str | None:
        content, calls = self._feed(choice, delta.text)
        logprobs = "null"
        if self._logprobs is not None and delta.logprobs:
            entries = chat_logprobs(delta.logprobs, pieces, self._logprobs)
            logprobs = f'{{"content":{dump(entries)},"refusal":null}}'
        elif not content and not calls and choice.begun:
            return None
        return self._chunk(choice, content, calls, logprobs, "null")

    def last(self, choice: Choice, reason: str, pieces: Pieces) -> str:
        content, calls = "", []
        if choice.parser is not None:
            content, news = choice.parser.finish()
            calls = [_call_news(call) for call in news]
        return self._chunk(choice, content, calls, "null", f'"{reason}"')

    def _chunk(self, choice: Choice, content: str, calls: list[dict[str, Any]], logprobs: str, reason: str) -> str:
        parts = []
        if not choice.begun:
            parts.append('"role":"assistant"')
        if content or not (choice.begun or calls):
            parts.append(f'"content":{quote(content)}')
        if calls:
            parts.append(f'"tool_calls":{dump(calls)}')
        choice.begun = True
        return (
            f'{{"index":{choice.index},"delta":{{{",".join(parts)}}},"logprobs":{logprobs},"finish_reason":{reason}}}'
        )

    def choice(self, choice: Choice, reason: str, pieces: Pieces) -> dict[str, Any]:
        logprobs = None
        if self._logprobs is not None:
            logprobs = dict(content=chat_logprobs(choice.logprobs, pieces, self._logprobs), refusal=None)
        text = "".join(choice.text)
        message: dict[str, Any] = dict(role="assistant", content=text, refusal=None)
        if self.tool_format:
            content, calls = parse(self.tool_format, text, choice.request_id, choice.number)
            if calls:
                message |= dict(content=content or None, tool_calls=[_called(call) for call in calls])
        return dict(index=choice.index, message=message, logprobs=logprobs, finish_reason=reason)


# ---------------------------------------------------------------- completions


_CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of a UTF-8 character that are not its first


def _token_text(piece: bytes) -> str:
    """The older endpoint's form of a token that is no valid UTF-8 by itself."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def completion_logprobs(
    entries: Sequence[dict[str, Any] | None], ids: list[int], pieces: Pieces, top: int, offset: int, first: bool
) -> dict[str, Any]:
    """`offset` is the place of the first token in the choice's text; first: it is the choice's first. An entry is None where nothing
    comes before the token."""
    tokens: list[str] = []
    offsets: list[int] = []
    chosen: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be of several tokens
    # The first tokens may be the rest of a character that began before them, which is not in the text until it is complete.
    inside: bool | None = False if first else None  # None: they may
    for token, entry in zip(ids, entries, strict=True):
        text = _token_text(pieces.pieces[token])
        shown = b"" if token in pieces.special else pieces.pieces[token]
        completed = 0
        if inside is not False and shown:
            rest = shown.lstrip(_CONTINUATION)
            if len(rest) < len(shown):
                inside = not rest
                completed = bool(rest)
            else:
                offset += inside is True  # it was complete before this token
                inside = False
            shown = rest
        tokens.append(text)
        offsets.append(offset)
        offset += completed + len(utf8.decode(shown))
        if entry is None:
            chosen.append(None)
            tops.append(None)
            continue
        logprob = _finite(entry["logprob"])
        chosen.append(logprob)
        likeliest = {_token_text(pieces.pieces[t]): _finite(p) for t, p in entry["top"][:top]}
        tops.append({text: logprob} | likeliest)
    return dict(text_offset=offsets, token_logprobs=chosen, tokens=tokens, top_logprobs=tops if top else None)


class CompletionRenderer(Renderer):
    """A choice's `prompt`, if it has one, goes before its text."""

    object_name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl-"

    def delta(self, choice: Choice, delta: Delta, pieces: Pieces) -> str | None:
        first = delta.position == 0
        return self._next(choice, delta.ids, delta.text, delta.logprobs or (), pieces, None, first)

    def last(self, choice: Choice, reason: str, pieces: Pieces) -> str:
        chunk = self._next(choice, [], "", (), pieces, reason)
        assert chunk is not None
        return chunk

    def _next(
        self,
        choice: Choice,
        ids: list[int],
        text: str,
        entries: Sequence[dict[str, Any] | None],
        pieces: Pieces,
        reason: str | None,
        first: bool = False,
    ) -> str | None:
        prompt = choice.prompt
        offset = choice.chars + (len(prompt.text) if prompt is not None else 0)
        choice.chars += len(text)
        if not choice.begun and prompt is not None:
            text = prompt.text + text
            if prompt.logprobs:
                ids, entries, offset, first = prompt.ids + ids, [*prompt.logprobs, *entries], 0, True
        choice.begun = True
        logprobs = "null"
        if self._logprobs is not None and entries:
            logprobs = dump(completion_logprobs(entries, ids, pieces, self._logprobs, offset, first))
        elif not text and reason is None:
            return None
        ended = "null" if reason is None else f'"{reason}"'
        return f'{{"index":{choice.index},"text":{quote(text)},"logprobs":{logprobs},"finish_reason":{ended}}}'

    def choice(self, choice: Choice, reason: str, pieces: Pieces) -> dict[str, Any]:
        text, ids = "".join(choice.text), choice.ids
        entries: Sequence[dict[str, Any] | None] = choice.logprobs
        if (prompt := choice.prompt) is not None:
            text, ids, entries = prompt.text + text, prompt.ids + ids, [*prompt.logprobs, *entries]
        logprobs = None
        if self._logprobs is not None:
            logprobs = completion_logprobs(entries, ids, pieces, self._logprobs, 0, True)
        return dict(index=choice.index, text=text, logprobs=logprobs, finish_reason=reason)
