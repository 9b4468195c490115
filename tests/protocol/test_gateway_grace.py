"""Gateways whose readers have left, on the in-memory bus in virtual time: a request that is read elsewhere, or may be, goes on."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any, cast

import pytest

from services.gateway.errors import ApiError
from services.gateway.generation import Generation, Generations
from services.gateway.settings import GatewaySettings
from shared.client_stream import Delta, Stream
from shared.memory_bus import MemoryBus
from tests.protocol.detokenizer_world import MODEL, World
from tests.protocol.virtual import until, virtual

BODY: dict[str, Any] = dict(prompt="x", max_tokens=1000)


async def gateway(world: World, grace: float) -> Generations:
    spawn = lambda coroutine, name: asyncio.get_running_loop().create_task(coroutine, name=name)  # noqa: E731
    generations = Generations(
        MemoryBus(world.broker), GatewaySettings(partitions=world.partitions, reattach_grace=grace), spawn
    )
    await generations.start()
    return generations


async def read(generations: Generations) -> Generation:
    """A call with an Idempotency-Key, up to the first tokens."""
    generation = await generations.begin(MODEL, "default", "r", dict(BODY), survives=True, patience=10.0)
    await until(lambda: generation.deltas or generation.end)
    return generation


async def ending(generation: Generation) -> str:
    await until(lambda: generation.end, 60)
    assert generation.end is not None
    return str(generation.end["event"])


@pytest.mark.parametrize("readers", [1, 2], ids=["read at one gateway", "at two, which do not excuse each other"])
@virtual
async def test_what_nobody_reads_is_cancelled_after_the_grace(readers: int) -> None:
    async with World(partitions=1) as world, world.client() as client:
        await world.detokenizer("a")
        world.plan("r", choices=[[1] * 1000])
        gateways = [await gateway(world, 3.0) for _ in range(2)]
        generations = [await read(one) for one in gateways[:readers]]
        stream = client.attach("r")
        for one, generation in zip(gateways, generations, strict=False):
            one.leave(generation)
        assert (await stream.result()).status == "cancelled"


@virtual
async def test_silence_of_the_others_proves_nothing_while_nats_is_away() -> None:
    """The client came back through another gateway; NATS is gone when the first one's grace ends."""
    async with World(partitions=1) as world:
        await world.detokenizer("a")
        world.plan("r", choices=[[1] * 1000])
        one, two = await gateway(world, 6.0), await gateway(world, 3.0)
        first = await read(one)
        left = asyncio.get_running_loop().time()
        one.leave(first)
        again = await read(two)
        await asyncio.sleep(left + 5.9 - asyncio.get_running_loop().time())
        world.broker.kill()
        await asyncio.sleep(4.0)
        world.broker.restart()
        assert await ending(again) == "finished"


@virtual
async def test_the_grace_of_one_gateway_is_not_cut_short_by_another() -> None:
    """The client left the first one long ago, and the second one a moment ago: that is the one to wait."""
    async with World(partitions=1) as world:
        await world.detokenizer("a")
        world.plan("r", choices=[[1] * 500])
        one, two, three = [await gateway(world, 6.0) for _ in range(3)]
        first = await read(one)
        left = asyncio.get_running_loop().time()
        one.leave(first)
        again = await read(two)
        await asyncio.sleep(left + 5.5 - asyncio.get_running_loop().time())
        two.leave(again)
        await asyncio.sleep(2.5)
        assert await ending(await read(three)) == "finished"


@virtual
async def test_a_request_that_has_ended_is_freed_without_a_collection() -> None:
    """With it go its tokens: a collection of the oldest objects may be hours away."""
    async with World(partitions=1) as world:
        await world.detokenizer("a")
        world.plan("r", choices=[[1] * 20])
        generations = await gateway(world, 3.0)
        generation = await read(generations)
        assert await ending(generation) == "finished"
        freed = weakref.ref(generation)
        gc.disable()
        try:
            generations.leave(generation)
            del generation
            await asyncio.sleep(1.0)
            assert freed() is None
        finally:
            gc.enable()


class Undecided:
    """A stream whose request the pipeline has neither accepted nor refused yet."""

    def __init__(self) -> None:
        self.known = False
        self.body: dict[str, Any] | None = {}
        self.ending: dict[str, Any] | None = None

    def take_deltas(self) -> list[Delta]:
        return []

    def abandon(self) -> None: ...


@pytest.mark.parametrize("refused", [True, False])
@virtual
async def test_a_key_belongs_to_whom_the_pipeline_gives_it(refused: bool) -> None:
    """A call with another body has come just before, and is not answered yet."""
    async with World(partitions=1) as world:
        await world.detokenizer("a")
        world.plan("r", choices=[[1] * 20])
        generations = await gateway(world, 3.0)
        stream = Undecided()
        other = Generation("default", "r", b"another body", True)
        other.follow(cast(Stream, stream))
        generations._all["r"] = other
        reading = asyncio.create_task(read(generations))
        await asyncio.sleep(0.5)
        assert not reading.done()
        if refused:
            stream.ending = dict(event="error", code="id_conflict")
            other.on_change()
            assert await ending(await reading) == "finished"
        else:
            stream.known = True
            other.on_change()
            with pytest.raises(ApiError, match="another body"):
                await reading
