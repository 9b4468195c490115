"""Events of a durable request, stored in RESULTS exactly once and in order, whoever writes and however often they retry.

Each append names the sequence that must be the subject's newest. If it is not (another owner wrote, an append whose acknowledgement
was lost did arrive after all, or this process has just taken over and knows nothing), what is stored is read first; the events there
say how far the writing has come. What is stored depends on the ids only up to how it is cut, so two writers continue each other.
"""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

from services.detokenizer.answer import BEGINNING, Answer, Cursor
from shared import subjects
from shared.api import TERMINAL_EVENTS, decode_body, encode_event, error_event
from shared.bus import Bus, BusError, PayloadTooLarge, WrongRevision
from shared.errors import ErrorCode, GorgonError

log = structlog.get_logger()

READ_TIMEOUT = 5.0


class ResultsWriter:
    """Writes one request's events. `news` is to be set when there is something; `finished` is when the terminal event is stored."""

    def __init__(self, bus: Bus, answer: Answer, at_least: int, delay: float) -> None:
        self.news = asyncio.Event()
        self.finished = asyncio.Event()
        self._bus = bus
        self._answer = answer
        self._at_least = at_least
        self._delay = delay
        self._subject = subjects.results(answer.state.key)
        self._last = 0
        self._cursors: dict[int, Cursor] = {}
        self._stored_terminal = False

    async def run(self) -> None:
        pause = 0.1
        while not self._stored_terminal:
            try:
                await self._wait_for_company()
                await self._write()
                pause = 0.1
            except WrongRevision:
                await self._read_again()
            except BusError as error:
                log.warning("result_not_stored", request_id=self._answer.state.key, error=repr(error))
                await asyncio.sleep(pause)
                pause = min(pause * 2, 2.0)
        self.finished.set()

    async def _wait_for_company(self) -> None:
        """Returns when enough tokens are there, or some have waited long enough, or the request has ended."""
        while not self._waiting():
            self.news.clear()
            await self.news.wait()
        loop = asyncio.get_running_loop()
        until = loop.time() + self._delay
        while not self._answer.ended and self._waiting() < self._at_least and loop.time() < until:
            self.news.clear()
            try:
                async with asyncio.timeout_at(until):
                    await self.news.wait()
            except TimeoutError:
                return

    def _waiting(self) -> int:
        """Tokens not stored yet; text that lags behind its token, or the end, counts as one."""
        tokens, lagging = 0, self._answer.ended
        for number, track in self._answer.tracks.items() if self._streams else ():
            position, offset = self._cursors.get(number, BEGINNING)
            tokens += max(0, track.stream.shown - position)
            lagging |= track.stream.chars > offset
        return tokens or int(lagging)

    @property
    def _streams(self) -> bool:
        return self._answer.opened.reply.stream

    async def _write(self) -> None:
        for event in self._answer.replay(dict(self._cursors), self._streams):
            if event["event"] in TERMINAL_EVENTS or event["ids"] or event["text"]:
                await self._append(event)
                self._note(event)

    async def _append(self, event: dict[str, Any]) -> None:
        encoding = self._answer.opened.reply.encoding
        try:
            data = encode_event(event, encoding)
            stored = await self._bus.append(self._subject, data, expected_last_subject_seq=self._last)
        except PayloadTooLarge as error:
            failure = GorgonError(ErrorCode.PAYLOAD_TOO_LARGE, f"the result does not fit into a message: {error}")
            data = encode_event(error_event(event["id"], failure), encoding)
            stored = await self._bus.append(self._subject, data, expected_last_subject_seq=self._last)
        self._last = stored.seq

    async def _read_again(self) -> None:
        try:
            newest = await self._bus.last_seq(subjects.STREAM_RESULTS, self._subject)
            if newest <= self._last:
                self._last = newest
                return
            follower = await self._bus.follow(subjects.STREAM_RESULTS, self._subject, self._last + 1)
            try:
                async with asyncio.timeout(READ_TIMEOUT):
                    async for stored in follower:
                        self._note(decode_body(stored.data)[0])
                        self._last = stored.seq
                        if stored.seq >= newest:
                            break
            finally:
                await follower.close()
        except (BusError, TimeoutError):
            await asyncio.sleep(0.1)  # the next append finds out again

    def _note(self, event: dict[str, Any]) -> None:
        if event["event"] in TERMINAL_EVENTS:
            self._stored_terminal = True
        elif event["event"] == "tokens":
            end = (event["position"] + len(event["ids"]), event["offset"] + len(event["text"]))
            self._cursors[event["choice"]] = end
