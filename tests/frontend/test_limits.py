"""Limits per tenant: the built-in limiter, and what the HTTP surface does with it."""

from __future__ import annotations

import pytest
from fake_catalog import FakeModel

from dynamo_core.config.schema import Admin, Frontend, Secret
from dynamo_core.contracts import RateLimiterContract
from dynamo_core.errors import RateLimited
from dynamo_core.frontend.contract import Principal
from dynamo_core.frontend.limits import Limits, PerTenant, rates


class TestPerTenant(RateLimiterContract):
    @pytest.fixture
    def make(self):
        def limiter(*, requests=None, tokens=None, seconds=60):
            return PerTenant(*(None if amount is None else f"{amount}/{seconds} seconds" for amount in (requests, tokens)))

        return limiter


@pytest.mark.parametrize(("text", "meaning"), [
    ("600/minute", ((600, 60.0),)), ("10/second; 300 per 5 minutes", ((10, 1.0), (300, 300.0))), ("", ()), (None, ()), ("1/day", ((1, 86400.0),)),
])
def test_limits_are_written_as_people_say_them(text, meaning):
    assert rates(text) == meaning


@pytest.mark.parametrize("text", ["lots", "0/minute", "5/0 seconds", "5", "-1/minute", "5/fortnight"])
def test_a_limit_that_is_no_limit_is_refused_at_load(text):
    with pytest.raises(ValueError, match="600/minute"):
        PerTenant(requests=text)
    with pytest.raises(ValueError, match="600/minute"):
        Limits(tokens=text)


async def test_every_limit_of_several_counts():
    limiter = PerTenant("2/second; 3/minute")
    await limiter.admit("a")
    await limiter.admit("a")
    with pytest.raises(RateLimited, match="2 per second"):
        await limiter.admit("a")


async def test_a_tenant_may_have_other_limits():
    limiter = PerTenant("1/minute", "10/minute", {"big": Limits(requests=""), "small": Limits(tokens="5/minute")})
    for _ in range(5):
        await limiter.admit("big")
    await limiter.admit("small")
    with pytest.raises(RateLimited):
        await limiter.admit("small")
    with pytest.raises(RateLimited):
        await limiter.reserve("small", 6)
    await limiter.reserve("big", 6)


class ByName:
    async def authenticate(self, headers):
        name = headers.get("authorization", "").removeprefix("Bearer ")
        return Principal(name or None, name, admin=name == "root")


async def test_a_limit_answers_429_with_retry_after_and_routes_nothing(run):
    async with run(authenticator=ByName(), limiter=PerTenant("2/minute")) as site:
        site.client.headers["authorization"] = "Bearer acme"
        assert [(await site.chat()).status_code for _ in range(2)] == [200, 200]
        refused = await site.chat()
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert len(site.model.starts) == 2
        site.client.headers["authorization"] = "Bearer other"
        assert (await site.chat()).status_code == 200


async def test_tokens_are_reserved_at_their_most_and_settled_at_what_they_were(start):
    async with start(authenticator=ByName(), limiter=PerTenant(tokens="100/hour")) as site:
        site.client.headers["authorization"] = "Bearer acme"
        for _ in range(5):  # 3 + 60 reserved, 3 + 3 used
            assert (await site.complete(max_tokens=60)).status_code == 200
        refused = await site.complete(max_tokens=80)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        never = await site.complete(max_tokens=500)
        assert (never.status_code, never.json()["error"]["code"], never.headers["x-should-retry"]) == (429, "insufficient_quota", "false")
        assert "retry-after" not in never.headers
        assert len(site.model.starts) == 5


async def test_a_request_that_fails_is_charged_for_what_it_used(start):
    model = FakeModel("m", script=[RateLimited("no")])
    async with start(model=model, authenticator=ByName(), limiter=PerTenant(tokens="100/hour")) as site:
        site.client.headers["authorization"] = "Bearer acme"
        for _ in range(10):
            await site.complete(max_tokens=80)
        assert len(model.starts) == 10


async def test_a_header_is_nobodys_account(start):
    async with start(limiter=PerTenant("2/minute")) as site:
        answers = [await site.client.post("/v1/completions", json={"model": "m", "prompt": "x"}, headers={"x-tenant-id": f"t{i}"}) for i in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]


async def test_tenants_stand_in_metrics_and_only_so_many(start):
    from dynamo_core.frontend.metrics import HttpMetrics

    async with start(authenticator=ByName()) as site:
        assert isinstance(site.app._service.metrics, HttpMetrics)
        site.app._service.metrics._tenant_labels = 2
        for name in ("a", "b", "c", "d", "a"):
            site.client.headers["authorization"] = f"Bearer {name}"
            await site.chat()
        await site.settled()
        assert [site.value("tenant_requests_total", tenant=t, status="200") for t in ("a", "b", "c", "other")] == [2, 1, 0, 2]
        assert site.value("tenant_tokens_total", tenant="a", kind="completion") == 6


async def test_a_salt_keeps_tenants_caches_apart(start):
    async with start(config=Frontend(tenant_cache_salt=True), authenticator=ByName()) as site:
        salts = []
        for name, salt in (("a", None), ("b", None), ("a", "x"), ("a:", None), ("b", "x")):
            site.client.headers["authorization"] = f"Bearer {name}"
            await site.chat(**({"cache_salt": salt} if salt else {}))
            salts.append(site.model.starts[-1][0].cache_salt)
        assert len(set(salts)) == 5
        assert None not in salts


async def test_debug_is_for_administrators(run):
    async with run(authenticator=ByName()) as site:
        site.client.headers["authorization"] = "Bearer acme"
        refused = await site.client.get("/debug/fleet")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
        site.client.headers["authorization"] = "Bearer root"
        assert (await site.client.get("/debug/fleet")).status_code == 200


async def test_metrics_and_debug_move_to_the_operators_address(start):
    from starlette.testclient import TestClient

    async with start(config=Frontend(admin=Admin(key=Secret("s3cret"))), authenticator=ByName()) as site:
        site.client.headers["authorization"] = "Bearer root"
        for path in ("/metrics", "/debug/fleet", "/debug/decisions"):
            assert (await site.client.get(path)).status_code == 404
        operators = TestClient(site.app.admin)
        for path in ("/metrics", "/debug/fleet"):
            assert operators.get(path).status_code == 401
            assert operators.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
            assert operators.get(path, headers={"authorization": "Bearer s3cret"}).status_code == 200
        assert "models" in operators.get("/health").json()
        site.catalog.problems["discovery"] = "10.1.2.3 does not answer"
        public = await site.client.get("/health")
        assert public.json()["problems"] == {"discovery": "see the operators' address"}
        assert "10.1.2.3" not in public.text
        assert "models" not in public.json()
