"""Whether the library takes a request's constraint, found out before the request is accepted."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from services.tokenizer.model_files import ModelFiles
from services.tokenizer.turns import Turns
from shared.errors import ErrorCode, GorgonError
from shared.structured import ConstraintError, Vocabulary

LOOK = 0.05  # seconds between two looks at work that is under way
REMEMBERED = 4096  # constraints that were found good
TENANT_SHARE = 0.5  # of the places to wait in that one tenant may take


class ConstraintChecker:
    """Compiles in threads of its own, so that neither the event loop nor other requests wait for a constraint made to be slow.

    A compilation cannot be broken off, but the library's limits end it. At most `waiting` wait for a thread; tenants get them in turns.
    """

    def __init__(self, files: ModelFiles, *, threads: int, timeout: float, waiting: int, retry_after: float) -> None:
        self._files = files
        self._threads = ThreadPoolExecutor(threads, "constraint")
        self._turns = Turns(threads)
        self._timeout = timeout
        self._most = waiting
        self._retry_after = retry_after
        self._good: OrderedDict[bytes, None] = OrderedDict()
        self._vocabulary: Vocabulary | None = None  # made when first needed: it takes a second of a large vocabulary

    async def check(self, constraint: str, field: str, tenant: str) -> None:
        """`field`: of the request, which names it in errors. Raises GorgonError: `invalid_request` with the reason, or `overloaded`."""
        digest = hashlib.blake2b(constraint.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self._good:
            self._good.move_to_end(digest)
            return
        if len(self._turns) >= self._most or self._turns.waiting_of(tenant) >= TENANT_SHARE * self._most:
            raise self._overloaded()
        # The first one waits for the vocabulary, which is not its fault.
        timeout = self._timeout if self._vocabulary is not None else None
        try:
            async with asyncio.timeout(timeout):
                await self._turns.take(tenant)
        except TimeoutError:
            raise self._overloaded() from None
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._compile, constraint)
        work.add_done_callback(self._done)
        try:
            await _within(timeout, work)
        except TimeoutError:
            message = f"{field}: not compiled within {self._timeout:g} s"
            raise GorgonError(ErrorCode.INVALID_REQUEST, message) from None
        except ConstraintError as error:
            raise GorgonError(ErrorCode.INVALID_REQUEST, f"{field}: {error}") from None
        self._good[digest] = None
        if len(self._good) > REMEMBERED:
            self._good.popitem(last=False)

    def _overloaded(self) -> GorgonError:
        message = f"{len(self._turns)} constraints wait to be compiled"
        return GorgonError(ErrorCode.OVERLOADED, message, retry_after=self._retry_after)

    def _done(self, work: asyncio.Future[None]) -> None:
        self._turns.give_back()
        if not work.cancelled():
            work.exception()  # told already, or nobody waits for it any more

    def _compile(self, constraint: str) -> None:
        """With the first mask: that is when much of the work is done."""
        if self._vocabulary is None:
            files = self._files
            self._vocabulary = Vocabulary(files.encoder.to_json(), files.vocab_size, files.eos_ids)
        matcher = self._vocabulary.compile(constraint)
        if not matcher.mask():
            raise ConstraintError(matcher.error)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


async def _within(timeout: float | None, work: asyncio.Future[None]) -> None:
    """Its result. Raises TimeoutError if it takes longer; time in which this process stood still does not count."""
    loop = asyncio.get_running_loop()
    left = timeout
    while not work.done():
        if left is not None and left <= 0:
            raise TimeoutError
        began = loop.time()
        await asyncio.wait([work], timeout=None if left is None else min(left, LOOK))
        if left is not None:
            left -= min(loop.time() - began, 2 * LOOK)
    work.result()
