"""The event loop of the simulation."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from shared.virtual_time import Deadlock, VirtualTimeLoop


def test_time_jumps_to_the_next_timer() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        times = [loop.time()]
        await asyncio.sleep(3600)
        times.append(loop.time())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await asyncio.Event().wait()
        times.append(loop.time())
        return times

    begin = time.monotonic()
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        assert runner.run(main()) == pytest.approx([0.0, 3600.0, 3600.5])
    assert time.monotonic() - begin < 60


def test_timers_of_one_instant_run_in_the_order_in_which_they_were_set() -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        order: list[int] = []
        for i in range(1000):
            loop.call_at(5.0 if i % 3 else 4.0, order.append, i)
        await asyncio.sleep(6)
        return order

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        order = runner.run(main())
    assert order == [i for i in range(1000) if i % 3 == 0] + [i for i in range(1000) if i % 3]


def test_a_cancelled_timer_does_not_run() -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        ran: list[int] = []
        timers = [loop.call_later(i / 1000, ran.append, i) for i in range(500)]
        for timer in timers[::2]:
            timer.cancel()
        await asyncio.sleep(1)
        return ran

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        assert runner.run(main()) == list(range(1, 500, 2))


def test_a_program_that_waits_for_ever_is_told_so() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    loop = VirtualTimeLoop()
    task = loop.create_task(main())
    with pytest.raises(Deadlock):
        loop.run_until_complete(task)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.close()


def test_runs_repeat_exactly() -> None:
    async def walker(name: int, chance: random.Random, trace: list[tuple[float, int]]) -> None:
        for _ in range(100):
            await asyncio.sleep(chance.choice([0, 0.001, 0.002, chance.random()]))
            trace.append((asyncio.get_running_loop().time(), name))

    async def main(seed: int) -> list[tuple[float, int]]:
        chance = random.Random(seed)
        trace: list[tuple[float, int]] = []
        await asyncio.gather(*(walker(i, chance, trace) for i in range(20)))
        return trace

    def run(seed: int) -> list[tuple[float, int]]:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(main(seed))

    assert run(1) == run(1)
    assert run(1) != run(2)
