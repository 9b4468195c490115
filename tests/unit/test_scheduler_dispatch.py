"""Who gets what becomes free: a request that needs much at a time gets its turn, too."""

from __future__ import annotations

import asyncio
from collections import deque

from services.scheduler.dispatch import PATIENCE, Dispatcher
from services.scheduler.fleet import Fleet, Link
from services.scheduler.ledger import Ledger
from shared.messages import Assignment, ReplyTo, Request, Tombstone
from shared.sampling import SamplingParams
from tests.unit.test_scheduler_fleet import beat

SLOTS = 8


class World:
    """Workers of SLOTS places, all taken by requests of one sequence, more of which always wait."""

    def __init__(self, *workers: str, free: int = 10_000) -> None:
        self.fleet, self.ledger = Fleet(Link(0.1, 1.0), 1.0, 2.0), Ledger()
        self.dispatcher = Dispatcher(self.fleet, self.ledger, {})
        self.running: deque[str] = deque()
        self.granted: dict[str, str] = {}  # request: worker
        self.tasks: set[asyncio.Task[None]] = set()
        self.count = self.revision = 0
        for worker in workers:
            self.fleet.heard(beat(worker, max_seqs=SLOTS, kv_tokens_free=free, kv_tokens_total=10_000))

    def submit(self, tenant: str, choices: int = 1, tokens: int = 1) -> str:
        self.count += 1
        key = f"{tenant}.r{self.count}"
        request = Request(key, "m", b"", bytes(4 * tokens), SamplingParams(), ReplyTo("x"), choices=choices)
        task = asyncio.create_task(self._run(request))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return key

    async def _run(self, request: Request) -> None:
        worker, need = await self.dispatcher.worker_for(request, expires=None)
        self._apply(request.key, Assignment(1, 1, worker.instance, b"", choices=need.choices))
        self.dispatcher.release(worker, need)
        self.granted[request.key] = worker.instance
        self.running.append(request.key)

    def _apply(self, key: str, value: Assignment | Tombstone) -> None:
        self.revision += 1
        self.ledger.apply(key, value, self.revision, 0.0)

    async def step(self, keep: str = "") -> None:
        """The oldest one ends (none on the worker `keep`), and another one of the small ones comes."""
        oldest = next(key for key in self.running if self.granted[key] != keep)
        self.running.remove(oldest)
        self._apply(oldest, Tombstone(1, 1, b"", "finished"))
        self.dispatcher.ended(oldest, 150)
        self.submit("small" if self.count % 2 else "other")
        await self.settle()

    async def settle(self) -> None:
        for _ in range(8):
            self.dispatcher.dispatch()
            await asyncio.sleep(0)

    async def filled(self) -> World:
        for number in range(3 * SLOTS * len(self.fleet.workers)):
            self.submit("small" if number % 2 else "other")
        await self.settle()
        return self

    async def close(self) -> None:
        self.dispatcher.drain()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def steps_until_granted(world: World, key: str, most: int = 200) -> int:
    for number in range(most):
        if key in world.granted:
            return number
        await world.step()
    raise AssertionError("it starves")


async def worker_kept(world: World, most: int = 100) -> str:
    for _ in range(most):
        if world.dispatcher.holds:
            return world.dispatcher.holds
        await world.step()
    raise AssertionError("no worker is kept")


async def test_one_that_needs_many_places_gets_them() -> None:
    world = await World("a").filled()
    wide = world.submit("wide", choices=6)
    assert await steps_until_granted(world, wide) <= PATIENCE + SLOTS
    assert world.dispatcher.holds == ""
    before = len(world.granted)
    for _ in range(20):
        await world.step()
    assert len(world.granted) >= before + 20, "nothing is kept any more"
    await world.close()


async def test_one_that_is_wider_than_a_worker_gets_an_empty_one() -> None:
    world = await World("a").filled()
    wide = world.submit("wide", choices=2 * SLOTS)
    assert await steps_until_granted(world, wide) <= PATIENCE + 3 * SLOTS
    await world.close()


async def test_only_one_worker_is_kept_and_the_others_go_on() -> None:
    world = await World("a", "b", "c").filled()
    wide = world.submit("wide", choices=6)
    another = world.submit("wider", choices=7)
    kept = await worker_kept(world)
    before = len(world.granted)
    for _ in range(10):
        await world.step(keep=kept)  # of that one none ends
    assert kept == world.dispatcher.holds and len(world.granted) == before + 10
    assert wide not in world.granted
    assert await steps_until_granted(world, wide) < 50
    assert await steps_until_granted(world, another) < 100
    await world.close()


async def test_what_it_was_kept_for_may_go_and_so_may_the_worker() -> None:
    world = await World("a", "b").filled()
    for leave in (world.dispatcher.drop, lambda key: world.fleet.remove(world.dispatcher.holds)):
        wide = world.submit("wide", choices=SLOTS)
        kept = await worker_kept(world)
        leave(wide)
        await world.settle()
        assert world.dispatcher.holds != kept
    await world.close()


async def test_a_worker_that_another_scheduler_keeps_is_left_alone() -> None:
    world = World("a", "b")
    world.fleet.heard_peer("s2", draining=False, holds="a")
    keys = [world.submit("small") for _ in range(4)]
    await world.settle()
    assert {world.granted[key] for key in keys} == {"b"}
    world.fleet.heard_peer("s2", draining=False)
    world.submit("small")
    await world.settle()
    assert set(world.granted.values()) == {"a", "b"}
    world.fleet.heard_peer("s2", draining=False, holds="a")
    world.fleet.heard_peer("s2", draining=True, holds="a")
    assert world.fleet.held_by_peers() == set()
    await world.close()


async def test_what_a_dead_scheduler_kept_is_given_out() -> None:
    """Nobody else may ask for a long time who is responsible, which is when dead peers were forgotten."""
    world = World("a")
    world.fleet.heard_peer("s2", draining=False, holds="a")
    key = world.submit("small")
    await world.settle()
    assert key not in world.granted
    for tenth in range(50):
        world.fleet.link.echoed(tenth / 10)
    world.dispatcher.dispatch()
    await world.settle()
    assert world.granted[key] == "a"
    await world.close()
