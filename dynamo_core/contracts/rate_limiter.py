"""The conformance kit of rate limiters. Inherit it, provide `make`, and run pytest.

    class TestMine(RateLimiterContract):
        @pytest.fixture
        def make(self):
            return lambda *, requests=None, tokens=None, seconds=60: Mine(...)

The guarantees, at length in docs/contracts/rate-limiter.md: L1 requests, L2 reserve and settle, L3 tenants, L4 at once, L5 never, L6 refusals are free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from dynamo_core.errors import QuotaExceeded, RateLimited
from dynamo_core.frontend.contract import RateLimiter

Make = Callable[..., RateLimiter]


class RateLimiterContract:
    """`make(requests=N, tokens=M, seconds=S)` returns a new limiter that gives each tenant N requests and M tokens in S seconds.

    `None` is no limit. Tests that wait use seconds of 2; all others take less time than a minute.
    """

    async def test_l1_requests_over_the_limit_are_refused_with_a_time(self, make: Make) -> None:
        limiter = make(requests=5, seconds=60)
        for _ in range(5):
            await limiter.admit("acme")
        with pytest.raises(RateLimited) as refused:
            await limiter.admit("acme")
        assert 0 < refused.value.retry_after <= 60
        assert not isinstance(refused.value, QuotaExceeded), "it would be taken later"

    async def test_l1_after_that_time_they_are_taken(self, make: Make) -> None:
        limiter = make(requests=2, seconds=2)
        for _ in range(2):
            await limiter.admit("acme")
        with pytest.raises(RateLimited) as refused:
            await limiter.admit("acme")
        await asyncio.sleep(refused.value.retry_after + 0.05)
        await limiter.admit("acme")

    async def test_l1_after_that_time_tokens_are_there(self, make: Make) -> None:
        limiter = make(tokens=100, seconds=2)
        await limiter.reserve("acme", 100)
        with pytest.raises(RateLimited) as refused:
            await limiter.reserve("acme", 80)
        await asyncio.sleep(refused.value.retry_after + 0.05)
        await limiter.reserve("acme", 80)

    async def test_l1_without_a_limit_nothing_is_refused(self, make: Make) -> None:
        limiter = make()
        for _ in range(1000):
            await limiter.admit("acme")
            (await limiter.reserve("acme", 10**6)).settle(10**6)

    async def test_l2_tokens_that_were_not_used_are_given_back(self, make: Make) -> None:
        limiter = make(tokens=1000, seconds=3600)
        for _ in range(10):
            (await limiter.reserve("acme", 900)).settle(10)
        with pytest.raises(RateLimited):
            await limiter.reserve("acme", 950)

    async def test_l2_tokens_in_use_count_until_they_are_settled(self, make: Make) -> None:
        limiter = make(tokens=1000, seconds=3600)
        held = await limiter.reserve("acme", 600)
        with pytest.raises(RateLimited):
            await limiter.reserve("acme", 600)
        held.settle(0)
        await limiter.reserve("acme", 600)

    async def test_l2_tokens_beyond_the_reservation_are_charged(self, make: Make) -> None:
        limiter = make(tokens=1000, seconds=3600)
        (await limiter.reserve("acme", 100)).settle(900)
        with pytest.raises(RateLimited):
            await limiter.reserve("acme", 200)

    async def test_l3_tenants_do_not_share(self, make: Make) -> None:
        limiter = make(requests=2, tokens=100, seconds=3600)
        for tenant in ("acme", "other", None):
            for _ in range(2):
                await limiter.admit(tenant)
            await limiter.reserve(tenant, 100)
        for tenant in ("acme", "other", None):
            with pytest.raises(RateLimited):
                await limiter.admit(tenant)

    async def test_l3_a_name_is_not_a_pattern(self, make: Make) -> None:
        limiter = make(requests=1, seconds=3600)
        for tenant in ("a", "A", "a/b", "a:b", "a ", "", "é", "*", "None", "a" * 64):
            await limiter.admit(tenant)

    async def test_l4_many_at_once_get_no_more_than_the_limit(self, make: Make) -> None:
        limiter = make(requests=10, tokens=1000, seconds=3600)

        async def taken(ask: Callable[[], object]) -> bool:
            try:
                await ask()  # type: ignore[misc]
            except RateLimited:
                return False
            return True

        assert sum(await asyncio.gather(*(taken(lambda: limiter.admit("acme")) for _ in range(100)))) == 10
        assert sum(await asyncio.gather(*(taken(lambda: limiter.reserve("acme", 100)) for _ in range(100)))) == 10

    async def test_l5_what_could_never_be_had_is_refused_for_good(self, make: Make) -> None:
        limiter = make(tokens=1000, seconds=3600)
        with pytest.raises(QuotaExceeded):
            await limiter.reserve("acme", 1001)
        await limiter.reserve("acme", 1000)

    async def test_l6_a_refused_reservation_costs_nothing(self, make: Make) -> None:
        limiter = make(tokens=1000, seconds=3600)
        held = await limiter.reserve("acme", 500)
        for _ in range(10):
            with pytest.raises(RateLimited):
                await limiter.reserve("acme", 600)
        await limiter.reserve("acme", 490)
        held.settle(0)
        await limiter.reserve("acme", 400)
