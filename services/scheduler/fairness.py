"""Whose turn it is: a queue in which tenants share by tokens served (virtual token counter: Sheng et al. 2024, "Fairness in serving
large language models", arXiv 2401.00588). Pure.

A tenant's counter grows by the tokens it is served, divided by its weight; the next request is taken from the tenant with the
smallest one. A tenant that comes back from idleness starts at the others' minimum: it gains no credit by waiting. Within a tenant
higher priorities go first, then the earlier ones. Output is charged in advance by the tenant's running mean and corrected at the end.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

INPUT_COST, OUTPUT_COST = 1.0, 2.0  # as in the paper
FIRST_GUESS = 128.0  # output tokens of a tenant's first request
SMOOTHING = 0.1


@dataclass(slots=True)
class Tenant(Generic[T]):
    weight: float
    counter: float = 0.0
    mean_output: float = FIRST_GUESS
    queue: list[tuple[int, int, T]] = field(default_factory=list)


class FairQueue(Generic[T]):
    """Items wait by tenant. `charge` is called for what was taken, `correct` when its true output is known."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = weights or {}
        self._tenants: dict[str, Tenant[T]] = {}
        self._order = itertools.count()

    def __len__(self) -> int:
        return sum(len(t.queue) for t in self._tenants.values())

    def __iter__(self) -> Iterator[T]:
        for tenant in self._tenants.values():
            for _, _, item in tenant.queue:
                yield item

    def put(self, tenant_name: str, priority: int, item: T) -> None:
        tenant = self._tenant(tenant_name)
        if not tenant.queue:
            busy = [t.counter for t in self._tenants.values() if t.queue]
            if busy:
                tenant.counter = max(tenant.counter, min(busy))
        heapq.heappush(tenant.queue, (-priority, next(self._order), item))

    def candidates(self) -> list[tuple[str, T]]:
        """The first item of each tenant, in the order of their claim. A later one may be served if an earlier one does not fit."""
        waiting = [(t.counter, name, t.queue[0][2]) for name, t in self._tenants.items() if t.queue]
        waiting.sort(key=lambda row: row[:2])
        return [(name, item) for _, name, item in waiting]

    def pop(self, tenant_name: str) -> T:
        return heapq.heappop(self._tenants[tenant_name].queue)[2]

    def remove(self, item: T) -> bool:
        for tenant in self._tenants.values():
            for row in tenant.queue:
                if row[2] is item:
                    tenant.queue.remove(row)
                    heapq.heapify(tenant.queue)
                    return True
        return False

    def charge(self, tenant_name: str, prompt_tokens: int, max_tokens: int) -> float:
        """Charges a request that was taken; returns the output tokens that were guessed, for `correct`."""
        tenant = self._tenant(tenant_name)
        guess = min(float(max_tokens), tenant.mean_output)
        tenant.counter += (INPUT_COST * prompt_tokens + OUTPUT_COST * guess) / tenant.weight
        return guess

    def correct(self, tenant_name: str, guess: float, output_tokens: int) -> None:
        tenant = self._tenant(tenant_name)
        tenant.counter += OUTPUT_COST * (output_tokens - guess) / tenant.weight
        tenant.mean_output += SMOOTHING * (output_tokens - tenant.mean_output)

    def counters(self) -> dict[str, float]:
        return {name: tenant.counter for name, tenant in self._tenants.items()}

    def _tenant(self, name: str) -> Tenant[T]:
        if (tenant := self._tenants.get(name)) is None:
            tenant = self._tenants[name] = Tenant(max(1e-6, self._weights.get(name, 1.0)))
        return tenant
