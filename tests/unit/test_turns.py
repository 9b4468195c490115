"""Places that tenants take in turns."""

from __future__ import annotations

import asyncio

from services.tokenizer.turns import Turns


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_tenant_that_asks_for_many_waits_behind_itself() -> None:
    turns, order = Turns(1), []

    async def work(tenant: str) -> None:
        await turns.take(tenant)
        order.append(tenant)
        await asyncio.sleep(0)
        turns.give_back()

    async with asyncio.TaskGroup() as group:
        for tenant in "aaaaabbc":
            group.create_task(work(tenant))
    assert order == list("aabcabaa")
    assert len(turns) == 0
    await turns.take("z")  # the place is free again


async def test_who_gives_up_takes_no_place_along() -> None:
    turns = Turns(1)
    await turns.take("a")
    waiting = [asyncio.create_task(turns.take(tenant)) for tenant in "abb"]
    await settle()
    assert len(turns) == 3 and turns.waiting_of("b") == 2
    waiting[0].cancel()
    await settle()
    assert len(turns) == 2 and turns.waiting_of("a") == 0
    turns.give_back()  # the first b has it now, but is told to go before it knows
    waiting[1].cancel()
    await settle()
    assert waiting[2].done() and not waiting[2].cancelled(), "the place went on to the next"
    turns.give_back()
    assert len(turns) == 0
    await turns.take("z")
