"""What comes of a request → the objects of OpenAI's API, whole or in chunks. No I/O.

JSON of chunks is put together by hand: they differ in a few values, and there is one for every token of every stream.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shared.client import Delta

FINGERPRINT = "gorgon"
_dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
LEAST_LOGPROB = -9999.0  # what OpenAI writes for a probability of zero

Pieces = Mapping[int, bytes]


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None = None) -> dict[str, Any]:
    usage: dict[str, Any] = dict(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )
    if cached_tokens is not None:
        usage["prompt_tokens_details"] = dict(cached_tokens=cached_tokens)
    return usage


@dataclass(frozen=True, slots=True)
class Prompt:
    """What `echo` gives back of a prompt: its text and, if asked for, the log-probabilities of its tokens in the pipeline's form
    (the first token has none)."""

    text: str
    ids: list[int]
    logprobs: list[dict[str, Any] | None] | None = None


class Choice:
    """One choice as far as it has been rendered."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.begun = False
        self.text: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self.chars = 0  # of the text that logprobs cover, for offsets


class Renderer:
    """Common to both endpoints. `include_usage`: every chunk says "usage": null but the last one."""

    object_name: str
    chunk_name: str
    id_prefix: str
    tells_prompt = False  # log-probabilities of prompts

    def __init__(self, base: str, created: int, model: str, *, include_usage: bool, logprobs: int | None) -> None:
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._identity: dict[str, Any] = dict(
            id=f"{self.id_prefix}{base}", object=self.object_name, created=created, model=model
        )
        head = self._identity | {"object": self.chunk_name, "system_fingerprint": FINGERPRINT}
        self._head = _dump(head)[:-1] + ',"choices":['
        self._tail = '],"usage":null}' if include_usage else "]}"

    @property
    def with_logprobs(self) -> bool:
        return self._logprobs is not None

    def chunk(self, choice: str, usage: dict[str, Any] | None = None) -> str:
        """`choice` is the JSON of one choice, or empty."""
        if usage is None:
            return f"{self._head}{choice}{self._tail}"
        return f'{self._head}{choice}],"usage":{_dump(usage)}}}'

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return self._identity | dict(choices=choices, usage=usage, system_fingerprint=FINGERPRINT)

    # ------------------------------------------------ what the endpoints differ in

    def tell_prompt(self, first: int, ids: list[int], entries: list[dict[str, Any]]) -> None:
        """What was told of the prompt of choice `first` and those after it; only for those that echo it."""

    def absorb(self, choice: Choice, delta: Delta) -> None:
        """Takes in what is not to be sent: a client that resumes has it, or it will be sent as a whole."""
        choice.begun = True
        choice.text.append(delta.text)
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
        piece = pieces[token]
        return dict(
            token=piece.decode("utf-8", "replace"),
            logprob=_finite(logprob),
            bytes=list(piece),
        )

    return [
        one(e["id"], e["logprob"]) | {"top_logprobs": [one(token, logprob) for token, logprob in e["top"][:top]]}
        for e in entries
    ]


class ChatRenderer(Renderer):
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def delta(self, choice: Choice, delta: Delta, pieces: Pieces) -> str | None:
        logprobs = "null"
        if self._logprobs is not None and delta.logprobs:
            content = chat_logprobs(delta.logprobs, pieces, self._logprobs)
            logprobs = f'{{"content":{_dump(content)},"refusal":null}}'
        elif not delta.text and choice.begun:
            return None
        role = "" if choice.begun else '"role":"assistant",'
        choice.begun = True
        return f'{{"index":{choice.index},"delta":{{{role}"content":{_dump(delta.text)}}},"logprobs":{logprobs},"finish_reason":null}}'

    def last(self, choice: Choice, reason: str, pieces: Pieces) -> str:
        delta = "{}" if choice.begun else '{"role":"assistant","content":""}'
        choice.begun = True
        return f'{{"index":{choice.index},"delta":{delta},"logprobs":null,"finish_reason":"{reason}"}}'

    def choice(self, choice: Choice, reason: str, pieces: Pieces) -> dict[str, Any]:
        logprobs = None
        if self._logprobs is not None:
            content = chat_logprobs(choice.logprobs, pieces, self._logprobs)
            logprobs = dict(content=content, refusal=None)
        message = dict(role="assistant", content="".join(choice.text), refusal=None)
        return dict(index=choice.index, message=message, logprobs=logprobs, finish_reason=reason)


# ---------------------------------------------------------------- completions


def _token_text(piece: bytes) -> str:
    """The older endpoint's form of a token that is no valid UTF-8 by itself."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def completion_logprobs(
    entries: Sequence[dict[str, Any] | None], ids: list[int], pieces: Pieces, top: int, offset: int
) -> dict[str, Any]:
    """`offset` is the place of the first token in the choice's text. An entry is None where nothing comes before the token."""
    tokens: list[str] = []
    offsets: list[int] = []
    chosen: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for token, entry in zip(ids, entries, strict=True):
        text = _token_text(pieces[token])
        tokens.append(text)
        offsets.append(offset)
        offset += len(pieces[token].decode("utf-8", "ignore"))
        if entry is None:
            chosen.append(None)
            tops.append(None)
            continue
        logprob = _finite(entry["logprob"])
        chosen.append(logprob)
        likeliest = {_token_text(pieces[t]): _finite(p) for t, p in entry["top"][:top]}
        tops.append({text: logprob} | likeliest)
    return dict(text_offset=offsets, token_logprobs=chosen, tokens=tokens, top_logprobs=tops if top else None)


class CompletionRenderer(Renderer):
    """`prompts`: what is echoed, by choice index; `n`: choices of a prompt; `silent`: nothing but the prompt is wanted (max_tokens 0);
    `tells_prompt`: with its log-probabilities."""

    object_name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, *args: Any, n: int = 1, silent: bool = False, tells_prompt: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompts: dict[int, Prompt] = {}
        self.tells_prompt = tells_prompt
        self._n = n
        self._silent = silent

    def tell_prompt(self, first: int, ids: list[int], entries: list[dict[str, Any]]) -> None:
        logprobs = [None if entry["logprob"] is None else entry for entry in entries]
        for index in range(first, first + self._n):
            self.prompts[index] = replace(self.prompts[index], ids=ids, logprobs=logprobs)

    def absorb(self, choice: Choice, delta: Delta) -> None:
        if not choice.begun and (prompt := self.prompts.get(choice.index)) is not None:
            choice.chars = len(prompt.text)
        super().absorb(choice, delta)

    def delta(self, choice: Choice, delta: Delta, pieces: Pieces) -> str | None:
        ids, text, entries = delta.ids, delta.text, list(delta.logprobs or ())
        if self._silent:
            ids, text, entries = [], "", []
        return self._next(choice, ids, text, entries, pieces, None)

    def last(self, choice: Choice, reason: str, pieces: Pieces) -> str:
        chunk = self._next(choice, [], "", [], pieces, reason)
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
    ) -> str | None:
        offset, choice.chars = choice.chars, choice.chars + len(text)
        if not choice.begun and (prompt := self.prompts.get(choice.index)) is not None:
            text = prompt.text + text
            choice.chars += len(prompt.text)
            if prompt.logprobs is not None:
                ids, entries = prompt.ids + ids, [*prompt.logprobs, *entries]
        choice.begun = True
        logprobs = "null"
        if self._logprobs is not None and entries:
            logprobs = _dump(completion_logprobs(entries, ids, pieces, self._logprobs, offset))
        elif not text and reason is None:
            return None
        ended = "null" if reason is None else f'"{reason}"'
        return f'{{"index":{choice.index},"text":{_dump(text)},"logprobs":{logprobs},"finish_reason":{ended}}}'

    def choice(self, choice: Choice, reason: str, pieces: Pieces) -> dict[str, Any]:
        text = "" if self._silent else "".join(choice.text)
        ids = [] if self._silent else [entry["id"] for entry in choice.logprobs]
        entries: list[dict[str, Any] | None] = [] if self._silent else list(choice.logprobs)
        if (prompt := self.prompts.get(choice.index)) is not None:
            text = prompt.text + text
            if prompt.logprobs is not None:
                ids, entries = prompt.ids + ids, prompt.logprobs + entries
        logprobs = None
        if self._logprobs is not None:
            logprobs = completion_logprobs(entries, ids, pieces, self._logprobs, 0)
        return dict(index=choice.index, text=text, logprobs=logprobs, finish_reason=reason)
