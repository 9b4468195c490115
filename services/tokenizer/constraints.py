"""Whether the library takes a request's constraint, found out before the request is accepted."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from services.tokenizer.model_files import ModelFiles
from shared.errors import ErrorCode, GorgonError
from shared.structured import ConstraintError, Vocabulary

REMEMBERED = 4096  # constraints that were found good


class ConstraintChecker:
    """Compiles in threads of its own, so that neither the event loop nor other requests wait for a constraint made to be slow.

    A compilation cannot be broken off, but the library's limits end it. At most `waiting` of them are waited for at a time.
    """

    def __init__(self, files: ModelFiles, *, threads: int, timeout: float, waiting: int, retry_after: float) -> None:
        self._files = files
        self._threads = ThreadPoolExecutor(threads, "constraint")
        self._timeout = timeout
        self._most = waiting
        self._retry_after = retry_after
        self._waiting = 0
        self._good: OrderedDict[bytes, None] = OrderedDict()
        self._vocabulary: Vocabulary | None = None  # made when first needed: it takes a second of a large vocabulary

    async def check(self, constraint: str) -> None:
        """Raises GorgonError: `invalid_request` with the reason, or `overloaded`."""
        digest = hashlib.blake2b(constraint.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self._good:
            self._good.move_to_end(digest)
            return
        if self._waiting >= self._most:
            message = f"{self._waiting} constraints are being compiled"
            raise GorgonError(ErrorCode.OVERLOADED, message, retry_after=self._retry_after)
        self._waiting += 1
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._compile, constraint)
        work.add_done_callback(self._done)
        try:
            # The first one waits for the vocabulary, which is not its fault.
            async with asyncio.timeout(self._timeout if self._vocabulary is not None else None):
                await asyncio.shield(work)
        except TimeoutError:
            message = f"structured: not compiled within {self._timeout:g} s"
            raise GorgonError(ErrorCode.INVALID_REQUEST, message) from None
        except ConstraintError as error:
            raise GorgonError(ErrorCode.INVALID_REQUEST, f"structured: {error}") from None
        self._good[digest] = None
        if len(self._good) > REMEMBERED:
            self._good.popitem(last=False)

    def _done(self, work: asyncio.Future[None]) -> None:
        self._waiting -= 1
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
