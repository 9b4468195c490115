"""A worker without a model whose tokens tell which epoch generated them: a stream in which epochs are mixed shows it.

A token is a hash of everything before it and of the epoch. So a stream is right exactly if whoever generated a token had seen
precisely the tokens before it, and if epochs never go back.

On SIGUSR1 its heartbeats cease, as if they were lost on the way: it goes on, while schedulers give its requests to another one.
"""

from __future__ import annotations

import asyncio
import signal
import struct
import zlib
from collections.abc import Sequence

from services.model_worker import fixed_engine
from services.model_worker.__main__ import ModelWorker
from services.model_worker.interface import EngineRequest
from services.model_worker.settings import FixedEngineSettings, WorkerSettings
from shared.sampling import SamplingParams
from shared.service import run_stage

HIGHEST_EPOCH = 40


class EpochSequence(fixed_engine.FixedSequence):
    __slots__ = ()

    def next_token(self, settings: FixedEngineSettings) -> int:
        token = self.token_of(self.request.epoch, settings)
        self._absorb(token)
        self.generated += 1
        return token

    def token_of(self, epoch: int, settings: FixedEngineSettings) -> int:
        digest = zlib.crc32(struct.pack("<QI", self.state, epoch))
        return settings.first_id + digest % (settings.vocab_size - settings.first_id)

    def absorb(self, token: int) -> None:
        self._absorb(token)


class SilentableWorker(ModelWorker):
    muted = False

    async def on_start(self) -> None:
        await super().on_start()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._mute)

    def _mute(self) -> None:
        self.muted = True

    def beat_now(self) -> None:
        if not self.muted:
            super().beat_now()


def mixed_at(prompt_ids: Sequence[int], seed: int, ids: Sequence[int], settings: FixedEngineSettings) -> int | None:
    """The first position whose token no epoch can have generated after the tokens before it; None if there is none."""
    params = SamplingParams(max_tokens=len(ids) + 1, seed=seed)
    sequence = EpochSequence(EngineRequest("", 0, 1, prompt_ids, params), (0, 0), settings)
    epoch = 1
    for position, token in enumerate(ids):
        while epoch <= HIGHEST_EPOCH and sequence.token_of(epoch, settings) != token:
            epoch += 1
        if epoch > HIGHEST_EPOCH:
            return position
        sequence.absorb(token)
    return None


if __name__ == "__main__":
    fixed_engine.FixedEngine.sequence = EpochSequence
    run_stage(SilentableWorker, WorkerSettings)
