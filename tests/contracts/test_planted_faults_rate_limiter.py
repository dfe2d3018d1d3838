"""Rate limiters that break one guarantee each: the kit finds every one."""

from __future__ import annotations

import asyncio
import inspect

import pytest

from dynamo_core.contracts.rate_limiter import RateLimiterContract
from dynamo_core.errors import QuotaExceeded, RateLimited
from dynamo_core.frontend.limits import PerTenant


class NeverRefuses(PerTenant):
    async def admit(self, tenant):
        return None


class SaysAnyTime(PerTenant):
    async def admit(self, tenant):
        try:
            await super().admit(tenant)
        except RateLimited as e:
            raise RateLimited(str(e), retry_after=0.0) from None


class SaysTooSoon(PerTenant):
    async def admit(self, tenant):
        try:
            await super().admit(tenant)
        except RateLimited as e:
            raise RateLimited(str(e), retry_after=e.retry_after / 10) from None


class Nothing:
    def settle(self, tokens):
        return None


class KeepsTheReservation(PerTenant):
    async def reserve(self, tenant, tokens):
        await super().reserve(tenant, tokens)
        return Nothing()


class ChargesAtTheEnd(PerTenant):
    async def reserve(self, tenant, tokens):
        held = await super().reserve(tenant, tokens)
        held.settle(0)
        held._tokens = 0
        return held


class GivesBackOnly(PerTenant):
    async def reserve(self, tenant, tokens):
        held = await super().reserve(tenant, tokens)
        settle = held.settle

        class Held:
            def settle(self, used):
                settle(min(used, tokens))

        return Held()


class OneAccount(PerTenant):
    def _account(self, tenant):
        return super()._account("everybody")


class FoldsNames(PerTenant):
    def _account(self, tenant):
        return super()._account(tenant and tenant.strip().lower())


class LooksThenTakes(PerTenant):
    """Waits between the two, so that all of a crowd see the same level."""

    def __attrs_post_init__(self):
        self.used = {}

    async def admit(self, tenant):
        used, limit = self.used.get(tenant, 0), int((self.requests or "1000000/").partition("/")[0])
        await asyncio.sleep(0)
        if used >= limit:
            raise RateLimited("no", retry_after=1.0)
        self.used[tenant] = used + 1


class NeverSaysNever(PerTenant):
    async def reserve(self, tenant, tokens):
        try:
            return await super().reserve(tenant, tokens)
        except QuotaExceeded as e:
            raise RateLimited(str(e), retry_after=1.0) from None


class ChargesRefusals(PerTenant):
    async def reserve(self, tenant, tokens):
        try:
            return await super().reserve(tenant, tokens)
        except RateLimited:
            for bucket in self._account(tenant).tokens:
                bucket.take(tokens)
            raise


FAULTS = [
    (NeverRefuses, "l1"), (SaysAnyTime, "l1"), (SaysTooSoon, "l1"), (KeepsTheReservation, "l2"), (ChargesAtTheEnd, "l2"), (GivesBackOnly, "l2"),
    (OneAccount, "l3"), (FoldsNames, "l3"), (LooksThenTakes, "l4"), (NeverSaysNever, "l5"), (ChargesRefusals, "l6"),
]


async def finds(cls, guarantee) -> bool:
    def make(*, requests=None, tokens=None, seconds=60):
        return cls(*(None if amount is None else f"{amount}/{seconds} seconds" for amount in (requests, tokens)))

    for name, test in inspect.getmembers(RateLimiterContract, inspect.isfunction):
        if name.startswith(f"test_{guarantee}_"):
            try:
                await test(RateLimiterContract(), make)
            except (Exception, pytest.fail.Exception):
                return True
    return False


@pytest.mark.parametrize(("fault", "guarantee"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
async def test_the_kit_finds(fault, guarantee):
    assert await finds(fault, guarantee)
