"""Whose turn it is: a queue in which tenants share by tokens served (virtual token counter: Sheng et al. 2024, "Fairness in serving
large language models", arXiv 2401.00588). Pure.

A tenant's counter grows by the tokens it is served, divided by its weight; the next request is taken from the tenant with the
smallest one. A tenant that comes back from idleness starts where the others are: it gains no credit by waiting. Within a tenant
higher priorities go first, then the earlier ones. Output is charged in advance by the tenant's running mean and corrected at the end.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

INPUT_COST, OUTPUT_COST = 1.0, 2.0  # as in the paper
FIRST_GUESS = 128.0  # output tokens of a tenant's first request
SMOOTHING = 0.1
REMEMBERED_TENANTS = 10_000
PRESENT = 60.0
FLOOD = 0.25  # of all places: who has less does not crowd others out, however many tenants there are


@dataclass(slots=True)
class Tenant(Generic[T]):
    weight: float
    counter: float = 0.0
    mean_output: float = FIRST_GUESS
    queue: list[tuple[int, int, T]] = field(default_factory=list)


class Shares:
    """Who has its share of the places and more than a little. A tenant counts as present for PRESENT seconds after it was last seen."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = weights or {}
        self._seen: OrderedDict[str, float] = OrderedDict()

    def seen(self, tenant: str, now: float) -> None:
        self._seen[tenant] = now
        self._seen.move_to_end(tenant)
        while now - next(iter(self._seen.values())) > PRESENT:
            self._seen.popitem(last=False)

    def has_its_share(self, tenant: str, used: int, places: int, running: Iterable[str]) -> bool:
        """Whether the tenant, with `used` of all places, has its part by weight, among the tenants that are present or have something
        running. Never if it is alone."""
        if used < FLOOD * places:
            return False
        present = {*self._seen, *running, tenant}
        if len(present) < 2:
            return False
        weights = sum(self._weight(name) for name in present)
        return used >= places * self._weight(tenant) / weights

    def _weight(self, tenant: str) -> float:
        return max(1e-6, self._weights.get(tenant, 1.0))


class Charge(NamedTuple):
    """What a tenant was charged for a request: its prompt, and a guess at its output."""

    tenant: str
    prompt_tokens: int
    output_tokens: float


def _cost(prompt_tokens: int, output_tokens: float) -> float:
    return INPUT_COST * prompt_tokens + OUTPUT_COST * output_tokens


class FairQueue(Generic[T]):
    """Items wait by tenant. `charge` is called for what was taken, `correct` when its true output is known, or else `refund`."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = weights or {}
        self._tenants: dict[str, Tenant[T]] = {}
        self._busy: dict[str, Tenant[T]] = {}  # those with something in their queue
        self._order = itertools.count()
        self._served_at = 0.0  # the counter of the tenant that was served last

    def __len__(self) -> int:
        return sum(len(t.queue) for t in self._busy.values())

    def put(self, tenant_name: str, priority: int, item: T) -> None:
        tenant = self._tenant(tenant_name)
        if not tenant.queue:
            tenant.counter = max(tenant.counter, min((t.counter for t in self._busy.values()), default=self._served_at))
            self._busy[tenant_name] = tenant
        heapq.heappush(tenant.queue, (-priority, next(self._order), item))

    def candidates(self) -> list[tuple[str, T]]:
        """The first item of each tenant, in the order of their claim. A later one may be served if an earlier one does not fit."""
        waiting = sorted((t.counter, name) for name, t in self._busy.items())
        return [(name, self._busy[name].queue[0][2]) for _, name in waiting]

    def pop(self, tenant_name: str) -> T:
        tenant = self._busy[tenant_name]
        self._served_at = tenant.counter
        item = heapq.heappop(tenant.queue)[2]
        if not tenant.queue:
            del self._busy[tenant_name]
        return item

    def remove(self, tenant_name: str, item: T) -> None:
        """Takes an item out of the queue."""
        tenant = self._busy[tenant_name]
        tenant.queue = [row for row in tenant.queue if row[2] is not item]
        heapq.heapify(tenant.queue)
        if not tenant.queue:
            del self._busy[tenant_name]

    def charge(self, tenant_name: str, prompt_tokens: int, max_tokens: int) -> Charge:
        """Charges a request that was taken."""
        tenant = self._tenant(tenant_name)
        charge = Charge(tenant_name, prompt_tokens, min(float(max_tokens), tenant.mean_output))
        tenant.counter += _cost(prompt_tokens, charge.output_tokens) / tenant.weight
        return charge

    def correct(self, charge: Charge, output_tokens: int) -> None:
        """The request is over, and this was its true output."""
        tenant = self._tenant(charge.tenant)
        tenant.counter += OUTPUT_COST * (output_tokens - charge.output_tokens) / tenant.weight
        tenant.mean_output += SMOOTHING * (output_tokens - tenant.mean_output)

    def refund(self, charge: Charge) -> None:
        """The request was not served after all."""
        tenant = self._tenant(charge.tenant)
        tenant.counter -= _cost(charge.prompt_tokens, charge.output_tokens) / tenant.weight

    def waiting(self, tenant_name: str) -> int:
        return len(self._busy[tenant_name].queue) if tenant_name in self._busy else 0

    def counters(self) -> dict[str, float]:
        return {name: tenant.counter for name, tenant in self._tenants.items()}

    def _tenant(self, name: str) -> Tenant[T]:
        if (tenant := self._tenants.get(name)) is None:
            if len(self._tenants) >= REMEMBERED_TENANTS:
                self._forget_idle()
            tenant = self._tenants[name] = Tenant(max(1e-6, self._weights.get(name, 1.0)))
        return tenant

    def _forget_idle(self) -> None:
        """Clients name tenants as they like. Those with the smallest counters would start where the others are anyway."""
        idle = [(t.counter, name) for name, t in self._tenants.items() if not t.queue]
        for _, name in heapq.nsmallest(len(idle) - REMEMBERED_TENANTS // 2, idle):
            del self._tenants[name]
