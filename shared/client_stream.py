"""One request as its client sees it: events folded by position and offset, until it has ended. No messaging but through the Client."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from shared import subjects
from shared.api import TERMINAL_EVENTS, as_error
from shared.call_reader import CallReader, calls_of
from shared.errors import ErrorCode, GorgonError
from shared.messages import PROMPT
from shared.tool_calls import ToolCall, ToolCallDelta

if TYPE_CHECKING:
    from shared.client import Client

log = structlog.get_logger()

FIRST_PATIENCE = 0.3  # silence after a token before the first question
WAITING_PATIENCE = 1.0  # the same before the first token: the request may be queued
LONGEST_PATIENCE = 5.0
UNSERVED_PATIENCE = 0.5  # never wait longer while nobody serves the partition
GAP_PATIENCE = 0.1  # between questions about one gap
FIRST_RETRY = 0.5  # of a request that is not accepted yet; doubled each time
LONGEST_RETRY = 4.0
FORGOTTEN_AFTER = 3.0  # seconds of "not_found" before it is believed (of a request that one attaches to: the default)


class Delta(NamedTuple):
    """What is new of one choice (PROMPT: of the prompt): `ids` from `position` on, `text` from character `offset` on. Either may be
    empty.

    `content` and `tool_calls` are what the text says, if the request has tools; else `content` is the text. They may lag behind the
    text, and then come in a last delta without ids and text."""

    choice: int
    position: int
    ids: list[int]
    text: str
    offset: int
    logprobs: list[dict[str, Any]] | None = None
    content: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(slots=True)
class ChoiceResult:
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop: str | int | None = None
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    content: str = ""  # the text without the tool calls in it
    tool_calls: list[ToolCall] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Result:
    """How a request ended. prompt: what was told of it, with echo or prompt_logprobs.
    `status` is "finished" or "cancelled"; an error raises instead. usage: counts of tokens. timings: ms."""

    id: str
    status: str
    choices: list[ChoiceResult]
    usage: dict[str, int]
    timings: dict[str, float]
    metadata: dict[str, Any]
    prompt: ChoiceResult | None = None


@dataclass(frozen=True, slots=True)
class Cursor:
    """How much of a choice is known already, for `attach`."""

    choice: int = 0
    position: int = 0
    offset: int = 0


class _Choice:
    """What is here of a choice, from the cursor on."""

    def __init__(self, request_id: str, at: Cursor) -> None:
        self.position = at.position
        self.offset = at.offset
        self.parts: list[str] = []
        self.result = ChoiceResult()
        self.reader = CallReader(request_id, at.choice, whole=at.position == at.offset == 0)


class Stream:
    """One request. Iterate for deltas; `text()` and `result()` wait for the end. An error event raises GorgonError.

    Whoever follows many streams gives each an `on_change`, which is called when the request is known to be accepted, when there are
    deltas and when it has ended, and reads without waiting: `take_deltas`, `known`, `ending`.
    """

    def __init__(
        self,
        client: Client,
        tenant: str,
        request_id: str,
        body: dict[str, Any] | None,
        cursors: Sequence[Cursor] = (),
        on_change: Callable[[], None] | None = None,
        accept_timeout: float | None = None,
        wait: float = FORGOTTEN_AFTER,
        silence: float = math.inf,
    ) -> None:
        now = client.loop.time()
        self.id = request_id
        self.tenant = tenant
        self.accepted: dict[str, Any] | None = None  # the event
        self.partition = subjects.partition_of(subjects.request_key(tenant, request_id), client.partitions)
        self.body = body  # None: attached to a request that somebody else made
        self._client = client
        self._choices = {c.choice: _Choice(request_id, c) for c in cursors}
        self._unread: deque[Delta] = deque()
        self._news = asyncio.Event()  # something is unread, or the stream has ended
        self._end: asyncio.Future[dict[str, Any]] = client.loop.create_future()
        self._error: GorgonError | None = None  # why the request was not accepted so far
        self._known = body is None  # accepted: from here on nothing may lose it
        self._started = False  # a token came
        self._due = now
        self._asked = -GAP_PATIENCE
        self._sent_again = -FIRST_RETRY
        self._retry = FIRST_RETRY
        self._patience = WAITING_PATIENCE
        self._give_up = now + (accept_timeout if accept_timeout is not None else client.accept_timeout)
        self._missing_since: float | None = None
        self._forgotten_after = wait
        self._silent_until = now + silence  # if nothing was heard by then, nobody is there
        self.moved = False  # a server that has restarted may not know the way to an imported client's inbox any more
        self._on_change = on_change
        # How tool calls are written: None until the `accepted` event tells, "" if there are none to be looked for.
        self._tool_format: str | None = None if body is not None and body.get("tools") else ""

    # ------------------------------------------------ for the caller

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        while not self._unread:
            if self._end.done():
                self._terminal_event(self._end.result())
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._unread.popleft()

    async def result(self) -> Result:
        """Waits for the end. Raises GorgonError if it is an error."""
        event = self._terminal_event(await asyncio.shield(self._end))
        ends = {c["choice"]: c for c in event.get("choices", ())}
        for index in ends:
            self._choice(index)
        results = []
        prompt = None
        for index, choice in sorted(self._choices.items()):
            result = choice.result
            result.text = "".join(choice.parts)
            if index == PROMPT:
                prompt = result
                continue
            if index in ends:
                end = ends[index]
                result.finish_reason, result.stop = end.get("finish_reason"), end.get("stop")
                result.tool_calls = calls_of(end)
            result.content = ends.get(index, {}).get("content", result.text)
            results.append(result)
        return Result(
            self.id,
            event["event"],
            results,
            event.get("usage", {}),
            event.get("timings", {}),
            event.get("metadata", {}),
            prompt,
        )

    async def text(self) -> str:
        """The text of the first choice, when it has ended."""
        choices = (await self.result()).choices
        return choices[0].text if choices else ""

    async def cancel(self) -> None:
        """Asks for the end; the stream then ends as cancelled, unless it was faster. Retried until heard."""
        while not self._end.done():
            if await self._client.cancel(self.id, self.tenant):
                return
            await asyncio.sleep(0.2)

    def take_deltas(self) -> list[Delta]:
        """What has come and was not read yet."""
        deltas = list(self._unread)
        self._unread.clear()
        return deltas

    def abandon(self) -> None:
        """Follows the request no longer; it goes on."""
        self._client.forget(self)
        self._on_change = None  # whoever it tells may hold this stream: what refers to itself waits for a collection

    @property
    def known(self) -> bool:
        """The request is accepted (or somebody else made it)."""
        return self._known

    @property
    def ending(self) -> dict[str, Any] | None:
        """The terminal event, once everything before it is there."""
        return self._end.result() if self._end.done() else None

    @property
    def cursors(self) -> list[Cursor]:
        """Where the stream stands: what `attach` needs to go on from here in another process."""
        return [Cursor(index, c.position, c.offset) for index, c in sorted(self._choices.items())]

    @property
    def done(self) -> bool:
        return self._end.done()

    # ------------------------------------------------ events

    def on_event(self, event: dict[str, Any]) -> None:
        if self._end.done():
            return
        self._silent_until = math.inf
        name = event.get("event")
        if name == "tokens":
            self._accept()
            self._missing_since = None
            self._on_tokens(event)
        elif name == "accepted":
            self._on_accepted(event)
        elif name == "error":
            self._on_error(event)
        elif name in TERMINAL_EVENTS:
            self._accept()
            if self._complete(event):
                self.finish(event)
            elif self._is_ahead(event):
                self.fail(GorgonError(ErrorCode.INVALID_REQUEST, "cursors: they are beyond the end of the answer"))
            else:
                self._gap()

    def _on_accepted(self, event: dict[str, Any]) -> None:
        self._accept()
        if self.accepted is None:
            self.accepted = event
            if self._tool_format is None:
                self._tool_format = event.get("tool_format", "")
            self.partition = int(event["replay"].rsplit(".", 1)[1])

    def _accept(self) -> None:
        if not self._known:
            self._known = True
            self._error = None
            self._due = self._client.loop.time() + self._patience
            self._changed()

    def _changed(self) -> None:
        self._news.set()
        if self._on_change is not None:
            try:
                self._on_change()
            except Exception as error:  # the reader's own fault: the client's other streams come next
                log.error("on_change_failed", request_id=self.id, exc_info=error)

    def _on_tokens(self, event: dict[str, Any]) -> None:
        index: int = event["choice"]
        choice = self._choice(index)
        ids, text, logprobs = event["ids"], event["text"], event.get("logprobs")
        skip, skip_text = choice.position - event["position"], choice.offset - event["offset"]
        if skip < 0 or skip_text < 0:
            self._gap()
            return
        if skip or skip_text:
            ids, text = ids[skip:], text[skip_text:]
        if not ids and not text:
            return
        content, calls = choice.reader.feed(text, self._tool_format) if index != PROMPT else (text, ())
        if logprobs is not None:
            logprobs = logprobs[skip:]
            choice.result.logprobs += logprobs
        self._unread.append(Delta(index, choice.position, ids, text, choice.offset, logprobs, content, calls))
        choice.position += len(ids)
        choice.offset += len(text)
        choice.result.ids += ids
        choice.parts.append(text)
        self._started = True
        self.moved = False
        self._error = None
        self._patience = FIRST_PATIENCE
        self._due = self._client.loop.time() + FIRST_PATIENCE
        self._changed()

    def _on_error(self, event: dict[str, Any]) -> None:
        error = as_error(event)
        now = self._client.loop.time()
        if error.code == ErrorCode.NOT_FOUND and not self._known:
            # Of a tokenizer; a server that has just restarted may not show yet what it has stored, so it is believed in the end only.
            self._error = error
        elif error.code == ErrorCode.NOT_FOUND:
            # It may be queued, or its partition's owner behind. If it was never accepted, sending it again is right and harmless.
            if self._missing_since is None:
                self._missing_since = now
            self._error = None  # what was refused was an attempt that was repeated with success, and waits for its turn
            if (self._started or self.body is None) and now - self._missing_since >= self._forgotten_after:
                self.fail(error)
            elif not self._started and self.body is not None and now >= self._sent_again + FIRST_RETRY:
                # Not at each answer: a tokenizer that has forgotten the id says the same, and at once.
                self._sent_again = now
                self._client.send(self)
        elif self._known and event.get("refused"):
            self._gap()  # the late refusal of an attempt, while another one was accepted
        elif not error.retryable or (not self._known and error.code not in self._client.retried):
            self.finish(event)
        elif not self._known:
            self._error = error
            self._due = now + max(error.retry_after or 0.0, self._retry)
            if self._due > self._give_up:
                self.finish(event)
        else:
            # The late refusal of an attempt, while another one was accepted: no accepted request ends with a retryable error.
            self._gap()

    def _complete(self, event: dict[str, Any]) -> bool:
        """Whether everything that the terminal event counts is here. An event with the whole text in it brings it along."""
        ends = list(event.get("choices", ()))
        if "prompt" in event:
            ends.insert(0, event["prompt"] | {"choice": PROMPT})
        for end in ends:
            choice = self._choice(end["choice"])
            if "text" in end:
                whole = dict(choice=end["choice"], position=0, ids=end["ids"], text=end["text"], offset=0)
                self._on_tokens(whole | ({"logprobs": end["logprobs"]} if "logprobs" in end else {}))
            if (choice.position, choice.offset) != (end["tokens"], end["chars"]):
                return False
        return True

    def _is_ahead(self, event: dict[str, Any]) -> bool:
        """Whether the cursors promised more than there is: no replay will ever agree with them."""
        ends = {end["choice"]: end for end in event.get("choices", ())}
        known = [(choice, ends[index]) for index, choice in self._choices.items() if index in ends]
        return any(choice.position > end["tokens"] or choice.offset > end["chars"] for choice, end in known)

    def finish(self, event: dict[str, Any]) -> None:
        self._client.forget(self)
        if not self._end.done():
            ends = {end["choice"]: end for end in event.get("choices", ())}
            for index, choice in self._choices.items():
                content, calls = choice.reader.finish(ends.get(index, {}))
                if content or calls:
                    last = Delta(index, choice.position, [], "", choice.offset, None, content, calls)
                    self._unread.append(last)
            self._end.set_result(event)
            self._changed()

    def fail(self, error: GorgonError) -> None:
        self.finish(dict(event="error", id=self.id, code=str(error.code), message=error.message))

    def break_off(self, error: Exception) -> None:
        """Ends because of a defect: an event that cannot be understood, say, which a replay would only bring again."""
        log.error("stream_failed", request_id=self.id, exc_info=error)
        self._choices.clear()
        self.fail(GorgonError(ErrorCode.INTERNAL, f"the client failed at this stream: {error!r}"))

    def _terminal_event(self, event: dict[str, Any]) -> dict[str, Any]:
        if event["event"] == "error":
            raise as_error(event)
        return event

    def _choice(self, index: int) -> _Choice:
        if (choice := self._choices.get(index)) is None:
            choice = self._choices[index] = _Choice(self.id, Cursor(index))
        return choice

    # ------------------------------------------------ time

    def tick(self, now: float) -> None:
        if now < self._due and not (self._known and self._unserved(now) and now >= self._asked + UNSERVED_PATIENCE):
            return
        if now >= self._silent_until:
            self.fail(GorgonError(ErrorCode.UNAVAILABLE, f"nobody answers for model {self._client.model!r}"))
        elif self._known:
            self._ask()
            self._due = now + self._patience
            self._patience = min(self._patience * 2, LONGEST_PATIENCE)
        elif now >= self._give_up:
            nobody = GorgonError(
                ErrorCode.UNAVAILABLE, f"nobody accepted the request for model {self._client.model!r} in time"
            )
            self.fail(self._error or nobody)
        else:
            self._client.send(self)
            self._due = min(now + self._retry, self._give_up)
            self._retry = min(self._retry * 2, LONGEST_RETRY)

    def stood_still(self, seconds: float) -> None:
        """Time in which nothing could be heard proves nothing."""
        self._give_up += seconds
        self._silent_until += seconds
        if self._missing_since is not None:
            self._missing_since += seconds

    def hurry(self) -> None:
        """Something changed (a reconnect, a new owner): look again at once."""
        self._due = self._client.loop.time()
        self._patience = FIRST_PATIENCE if self._started else WAITING_PATIENCE

    def _unserved(self, now: float) -> bool:
        return not self._client.is_served(self.partition, now)

    def _gap(self) -> None:
        if self._client.loop.time() >= self._asked + GAP_PATIENCE:
            self._ask()
        else:
            self._due = min(self._due, self._asked + GAP_PATIENCE)

    def _ask(self) -> None:
        self._asked = self._client.loop.time()
        self._client.ask_replay(self)
