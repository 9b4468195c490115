"""Text of one choice, with stop strings.

A stop string is looked for in the text, wherever token borders fall. Of several, the one that is *complete* first wins; of those
complete at the same character, the longest. The text is cut before it, and the tokens that count are those up to the one that
completed it. All of that depends on the ids alone, so two owners, or one that replays, agree without asking each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.detokenizer.decoding import Decoding


class StopMatcher:
    """Lets text through, but keeps back the end of it while that may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(stops, key=len, reverse=True)  # of those complete at the same character the first is taken
        self._beginnings = frozenset(stop[:length] for stop in stops for length in range(1, len(stop)))
        self._longest = max(map(len, self._beginnings), default=0)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Returns what of the text can be shown. Once `matched` is set there is no more."""
        text = self._held + text
        end = len(text) + 1
        for stop in self._stops:
            at = text.find(stop, 0, end - 1)
            if at >= 0:
                end = at + len(stop)
                self.matched = stop
        if self.matched is not None:
            self._held = ""
            return text[: end - len(self.matched)]
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """No more text is coming: what was kept back was no stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that is a beginning of a stop string."""
        for length in range(min(len(text), self._longest), 0, -1):
            if text[len(text) - length :] in self._beginnings:
                return length
        return 0


class ChoiceStream:
    """Ids in, text out, for one choice.

    chars     how many characters can be shown so far; the text only ever grows
    shown     how many ids belong to the answer: all that were fed, or those up to the one that completed a stop string
    matched   the stop string that ended it, if one did
    """

    __slots__ = ("_decoding", "_flushed", "_matcher", "_parts", "chars", "shown")

    def __init__(self, decoding: Decoding, stops: Sequence[str] = ()) -> None:
        self._decoding = decoding
        self._matcher = StopMatcher(stops) if stops else None
        self._flushed = False
        self._parts: list[str] = []
        self.chars = 0
        self.shown = 0

    @property
    def matched(self) -> str | None:
        return self._matcher.matched if self._matcher is not None else None

    @property
    def text(self) -> str:
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def text_from(self, offset: int) -> str:
        """The text from character `offset` on; cheap if that is near the end."""
        missing = self.chars - offset
        if missing <= 0:
            return ""
        if len(self._parts[-1]) == missing:
            return self._parts[-1]
        taken: list[str] = []
        while missing > 0:
            part = self._parts[-1 - len(taken)]
            taken.append(part[-missing:])
            missing -= len(part)
        return "".join(reversed(taken))

    def feed(self, ids: Sequence[int], hidden: int = 0) -> None:
        """Takes the next ids. The last `hidden` of them (the stop id) are part of the answer but leave no text."""
        visible = ids[: len(ids) - hidden] if hidden else ids
        if self._matcher is None:
            self.shown += len(ids)
            self._show(self._decoding.feed(visible))
            return
        for token in visible:
            if self._matcher.matched is not None:
                return
            self.shown += 1
            if text := self._decoding.feed((token,)):
                self._show(self._matcher.feed(text))
        if self._matcher.matched is None:
            self.shown += hidden

    def flush(self) -> None:
        """The choice is over: shows what was kept back."""
        if self._flushed or self.matched is not None:
            return
        self._flushed = True
        rest = self._decoding.flush()
        if self._matcher is not None:
            rest = self._matcher.feed(rest)
            if self._matcher.matched is None:
                rest += self._matcher.flush()
        self._show(rest)

    def _show(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self.chars += len(text)
