"""One HTTP call: reads its requests' generations, a request for each prompt, and gives what comes to a renderer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from services.gateway.cursor import Cursor, Progress
from services.gateway.errors import CLIENT_CLOSED_REQUEST, ApiError
from services.gateway.generation import Generation, Generations
from services.gateway.render import ChatRenderer, Choice, CompletionRenderer, Prompt, dump
from services.gateway.sse import Bell
from services.gateway.vocabulary import Vocabulary
from shared.api import as_error
from shared.client_stream import Delta
from shared.messages import PROMPT
from shared.tool_calls import MARKERS, parse


@dataclass(slots=True)
class Part:
    """A prompt's request; its choices are numbered from `first` on. `read` counts the deltas that were; those in `held` wait for
    something that has to be known before them."""

    generation: Generation
    first: int
    prompt: Prompt | None
    read: int = 0
    held: list[Delta] = field(default_factory=list)
    ended: bool = False


class Call:
    """What is wanted beside the text:

    usage             a last chunk with the usage;  continuous_usage: the usage so far in every chunk
    echo              the prompt before each choice
    tools             calls are looked for in the text
    """

    def __init__(
        self,
        generations: Generations,
        renderer: ChatRenderer | CompletionRenderer,
        cursor: Cursor,
        vocabulary: Vocabulary,
        *,
        usage: bool = False,
        continuous_usage: bool = False,
        echo: bool = False,
        tools: bool = False,
    ) -> None:
        self.renderer = renderer
        self.parts: list[Part] = []
        self._generations = generations
        self._cursor = cursor
        self._vocabulary = vocabulary
        self._usage = usage
        self._continuous_usage = continuous_usage
        self._echo = echo
        self._tools = tools
        self._choices: dict[int, Choice] = {}
        self._bell = Bell()
        self._ring: Callable[[], None] = self._bell.ring
        self._closed = False

    def read(self, generation: Generation, first: int) -> None:
        self.parts.append(Part(generation, first, Prompt() if self._echo else None))
        generation.bells.add(self._ring)

    def close(self) -> None:
        """The reader goes. What has not ended goes on or is cancelled, as Generations decides."""
        if not self._closed:
            self._closed = True
            for part in self.parts:
                part.generation.bells.discard(self._ring)
                self._generations.leave(part.generation)
            self._ring = self._bell.ring  # the reader's holds this call: what refers to itself waits for a collection

    async def until_accepted(self) -> None:
        """Until nothing that a status code could tell can happen any more. Raises ApiError."""
        while True:
            for part in self.parts:
                self._check(part.generation)
            if all(part.generation.known or part.generation.end is not None for part in self.parts):
                return
            await self._bell.wait()

    @staticmethod
    def _check(generation: Generation) -> None:
        """Raises ApiError if the request has ended otherwise than well."""
        end = generation.end
        if end is None or end["event"] == "finished":
            return
        if end["event"] == "cancelled":
            message = "the request was cancelled"
            raise ApiError(CLIENT_CLOSED_REQUEST, message, type="cancelled_error", code="cancelled")
        raise ApiError.of(as_error(end))

    # ------------------------------------------------ as a whole

    async def whole(self) -> dict[str, Any]:
        """The answer. Raises ApiError."""
        while True:
            for part in self.parts:
                self._check(part.generation)
            if all(part.generation.end is not None for part in self.parts):
                break
            await self._bell.wait()
        choices = []
        for part in self.parts:
            end = part.generation.end
            assert end is not None
            self._find_tool_format(part)
            for delta in part.generation.deltas:
                await self._learn(delta)
                if delta.choice == PROMPT:
                    if part.prompt is not None:
                        part.prompt.extend(delta)
                else:
                    self.renderer.absorb(self._choice(part, delta.choice), delta)
            for ended in end["choices"]:
                choice = self._choice(part, ended["choice"])
                choices.append(self.renderer.choice(choice, ended["finish_reason"], self._vocabulary))
        return self.renderer.whole(choices, self._usage_at_end())

    def _usage_at_end(self) -> dict[str, Any]:
        usages = [end["usage"] for part in self.parts if (end := part.generation.end) is not None]
        generated = sum(u["completion_tokens"] for u in usages)
        # A stored result of an earlier version does not tell of the cache.
        cached = sum(u.get("cached_tokens", 0) for u in usages)
        usage = _usage(sum(u["prompt_tokens"] for u in usages), generated)
        return usage | {"prompt_tokens_details": {"cached_tokens": cached}}

    # ------------------------------------------------ as a stream

    def on_news(self, callback: Callable[[], None]) -> None:
        """`callback` is called at each change from now on, in place of the bell."""
        for part in self.parts:
            part.generation.bells.discard(self._ring)
            part.generation.bells.add(callback)
        self._ring = callback

    def take_now(self) -> bytes | None:
        """Server-sent events of what has come; None where that takes waiting, or something has ended: `take` is for that."""
        if self.renderer.with_logprobs:
            return None
        for part in self.parts:
            if part.generation.end is not None:
                return None
        out: list[str] = []
        for part in self.parts:
            self._read(part)
            self._show(part, out)
        return "".join(out).encode()

    async def take(self) -> tuple[bytes, bool]:
        """Server-sent events of what has come, and whether they are the last."""
        out: list[str] = []
        error: ApiError | None = None
        for part in self.parts:
            try:
                await self._news(part, out)
            except ApiError as failed:
                error = failed
        last = error is not None or all(part.ended for part in self.parts)
        if error is not None:
            # After the status has been sent, this is how OpenAI's clients hear of it.
            out.append(f"data: {dump(error.body)}\n\n")
        elif last:
            if self._usage and not self._cursor.usage_sent:
                self._cursor.usage_sent = True
                out.append(self._event("", self._usage_at_end()))
            out.append("data: [DONE]\n\n")
        return "".join(out).encode(), last

    async def _news(self, part: Part, out: list[str]) -> None:
        """Raises ApiError if the request has failed; what came before it is in `out`."""
        generation = part.generation
        learned = part.read
        while learned < len(generation.deltas):  # more may come meanwhile
            await self._learn(generation.deltas[learned])
            learned += 1
        self._read(part)
        if not self._show(part, out):
            return
        end = generation.end
        if end is None or part.ended:
            return
        self._check(generation)
        part.ended = True
        for ended in end["choices"]:
            progress = self._cursor.choices.get(part.first + ended["choice"])
            if progress is None or not progress.finished:
                choice = self._choice(part, ended["choice"])
                chunk = self.renderer.last(choice, ended["finish_reason"], self._vocabulary)
                self._cursor.choices.setdefault(choice.index, Progress()).finished = True
                out.append(self._event(chunk, self._usage_so_far()))

    def _read(self, part: Part) -> None:
        deltas = part.generation.deltas
        for delta in deltas[part.read :]:
            if delta.choice != PROMPT:
                part.held.append(delta)
            elif part.prompt is not None:
                part.prompt.extend(delta)
        part.read = len(deltas)

    def _show(self, part: Part, out: list[str]) -> bool:
        """False if something is missing that comes before what was read."""
        if not self._may_go_on(part):
            return False
        for delta in part.held:
            self._on_delta(part, delta, out)
        part.held.clear()
        return True

    def _may_go_on(self, part: Part) -> bool:
        """Whether all is known that comes before the choices' text: events may overtake each other."""
        if self._tools:
            self._find_tool_format(part)
            if self._cursor.tool_format is None:
                return False
        if part.prompt is None or part.generation.end is not None:
            return True
        accepted = part.generation.stream.accepted
        if accepted is None:  # of a stream that is gone on with: what has begun has its prompt
            return bool(part.prompt.ids) or all(
                part.first + delta.choice in self._cursor.choices for delta in part.held
            )
        return len(part.prompt.ids) >= int(accepted["prompt_tokens"])

    def _find_tool_format(self, part: Part) -> None:
        """The event of acceptance names it; where that was lost, the end shows it."""
        if not self._tools or not isinstance(self.renderer, ChatRenderer):
            return
        generation = part.generation
        if self._cursor.tool_format is None:
            if generation.stream.accepted is not None:
                self._cursor.tool_format = generation.stream.accepted.get("tool_format", "")
            elif generation.end is not None:
                self._cursor.tool_format = format_of(generation)
        self.renderer.tool_format = self._cursor.tool_format or ""

    def _on_delta(self, part: Part, delta: Delta, out: list[str]) -> None:
        index = part.first + delta.choice
        progress = self._cursor.choices.get(index)
        choice = self._choice(part, delta.choice)
        if progress is None:
            progress = self._cursor.choices[index] = Progress()
        elif progress.position > delta.position or progress.offset > delta.offset:
            old, new = split(delta, progress.position, progress.offset)
            self.renderer.absorb(choice, old)
            if new is None:
                return
            delta = new
        chunk = self.renderer.delta(choice, delta, self._vocabulary)
        progress.position = delta.position + len(delta.ids)
        progress.offset = delta.offset + len(delta.text)
        if chunk is not None:
            out.append(self._event(chunk, self._usage_so_far()))

    def _usage_so_far(self) -> dict[str, Any] | None:
        if not self._continuous_usage:
            return None
        prompts = [part.generation.stream.accepted for part in self.parts]
        prompt_tokens = sum(accepted["prompt_tokens"] for accepted in prompts if accepted is not None)
        return _usage(prompt_tokens, sum(p.position for p in self._cursor.choices.values()))

    def _event(self, choice: str, usage: dict[str, Any] | None) -> str:
        return f"id: {self._cursor}\ndata: {self.renderer.chunk(choice, usage)}\n\n"

    def _choice(self, part: Part, number: int) -> Choice:
        index = part.first + number
        if (choice := self._choices.get(index)) is None:
            choice = self._choices[index] = Choice(index, part.generation.id, number, part.prompt)
            choice.begun = index in self._cursor.choices
        return choice

    async def _learn(self, delta: Delta) -> None:
        if self.renderer.with_logprobs and delta.logprobs:
            ids = {e["id"] for e in delta.logprobs} | {token for e in delta.logprobs for token, _ in e["top"]}
            await self._vocabulary.learn(ids)


def format_of(generation: Generation) -> str:
    """The format in which the calls are written that the request's end names."""
    assert generation.end is not None
    for ended in generation.end.get("choices", ()):
        if "tool_calls" in ended:
            text = "".join(delta.text for delta in generation.deltas if delta.choice == ended["choice"])
            told = [(call["id"], call["name"], call["arguments"]) for call in ended["tool_calls"]]
            for name in MARKERS:
                content, calls = parse(name, text, generation.id, ended["choice"])
                if content == ended["content"] and [call[:3] for call in calls] == told:
                    return name
    return ""


def split(delta: Delta, position: int, offset: int) -> tuple[Delta, Delta | None]:
    """A delta's part before the cursor and, if there is any, the part after it."""
    ids, chars = max(position - delta.position, 0), max(offset - delta.offset, 0)
    logprobs = delta.logprobs
    old = Delta(
        delta.choice,
        delta.position,
        delta.ids[:ids],
        delta.text[:chars],
        delta.offset,
        logprobs[:ids] if logprobs is not None else None,
    )
    if ids >= len(delta.ids) and chars >= len(delta.text):
        return old, None
    new = Delta(
        delta.choice,
        delta.position + min(ids, len(delta.ids)),
        delta.ids[ids:],
        delta.text[chars:],
        delta.offset + min(chars, len(delta.text)),
        logprobs[ids:] if logprobs is not None else None,
    )
    return old, new


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    total = prompt_tokens + completion_tokens
    return dict(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=total)
