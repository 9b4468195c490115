"""What the I/O thread asks of an engine. No torch in here: the service and its tests run with any engine that keeps this contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from services.model_worker.interface import EngineRequest, EngineStats, StepOutput

# Steps that retired since the last call, oldest first.
OnSteps = Callable[[list[StepOutput]], None]
# The engine is dead: the exception, and the ids of the requests that took part in the step that raised it.
OnFatal = Callable[[BaseException, Sequence[str]], None]
# What is being done, and the share of the whole that is done, 0..1.
Progress = Callable[[str, float], None]


class EngineLimits(NamedTuple):
    """Known once the model is loaded. Lengths in tokens."""

    max_model_len: int
    vocab_size: int
    max_seqs: int
    block_size: int


class Engine(Protocol):
    """Every method and both callbacks run on the event loop, and none of them blocks it.

    After `on_fatal` the engine does nothing more, and nothing but `stop` may be called.
    """

    @property
    def limits(self) -> EngineLimits: ...

    async def load(self, progress: Progress) -> None:
        """Loads the model and begins to run steps. Raises what loading raises."""

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        """Takes all of these sequences or none. Raises EngineOverloaded, RequestRejected."""

    def abort(self, request_id: str, epoch: int) -> None:
        """Ends the request's sequences of this and lower epochs. Outputs of steps in flight may still come."""

    def pause(self, paused: bool) -> None:
        """While paused no new step begins. Outputs of steps in flight may still come."""

    async def stop(self) -> None:
        """Ends all work at the next step boundary. When this returns, `on_steps` has had every step that retired."""

    def stats(self) -> EngineStats: ...

    def check_idle(self) -> list[str]:
        """Complaints if, with nothing to do, some pool is not full."""
