"""Sessions, busy thresholds and adapters, through real routers."""

from __future__ import annotations

import pytest

from dynamo_core.cards import ModelCard
from dynamo_core.config.schema import Router as RouterConfig
from dynamo_core.config.schema import Use
from dynamo_core.errors import AllBusy, NoWorker
from dynamo_core.plugins import Plugins
from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.routing.router import Router
from dynamo_core.routing.stack import build_stack
from dynamo_core.types import Hints, Instance

PLUGINS = Plugins.load()


class Site:
    def __init__(self, workers: int = 4, cards: dict[int, dict] | None = None, **config) -> None:
        self.now = 0.0
        self.router = Router("m", build_stack(RouterConfig(**config), PLUGINS), clock=lambda: self.now)
        for i in range(1, workers + 1):
            card = {"block_size": 16, "total_blocks": 100, "max_batched_tokens": 512, **(cards or {}).get(i, {})}
            self.router.joined(Worker(i), Instance(id=i, namespace="n", component="c", endpoint="e", address="a"), ModelCard(name="m", **card))
            self.router.proven(Worker(i))

    def route(self, name: str, tokens: int = 32, *, adapter: str | None = None, start: int = 0, **hints):
        request = RoutingRequest(name, "m", list(range(start, start + tokens)), tokens, hints=Hints(**hints), adapter=adapter)
        decision = self.router.route(request)
        self.router.booked(request, decision.worker, 0)
        return decision.worker


@pytest.mark.parametrize("stack", [{"filters": (Use("session"),)}, {"scorers": (Use("load"), Use("session-affinity", weight=5.0))}])
def test_a_session_stays_with_its_worker_until_it_was_idle_for_too_long(stack):
    site = Site(facts=(Use("sessions", {"ttl": 60}),), **stack)
    homes = {s: site.route(f"{s}0", session=s) for s in "abcd"}
    for turn in range(1, 4):
        site.now += 50
        assert {s: site.route(f"{s}{turn}", session=s) for s in "abcd"} == homes
    site.now += 61
    column = next(iter(c for f, c in site.router.dry_run(RoutingRequest("x", "m", prompt_tokens=9, hints=Hints(session="a"))).columns.items() if f.name == "session.here"))
    assert not any(column)


def test_a_session_whose_worker_is_gone_or_may_not_serve_is_bound_anew():
    site = Site(filters=(Use("session"),))
    home = site.route("a0", session="a")
    site.router.draining(home)
    second = site.route("a1", session="a")
    assert second != home
    site.router.left(second)
    assert site.route("a2", session="a") not in (home, second)


def test_sessions_are_remembered_up_to_a_limit():
    site = Site(filters=(Use("session"),), facts=(Use("sessions", {"limit": 10}),))
    for i in range(100):
        site.route(f"{i}", session=f"s{i}")
    provider = next(p.component for p in site.router.providers if p.use == "sessions")
    assert len(provider._bound) == 10


@pytest.mark.parametrize("options", [{"blocks": 0.5}, {"prefill_tokens": 600}, {"prefill_share": 1.2}])
def test_busy_workers_are_spared_and_when_all_are_busy_the_answer_is_529(options):
    site = Site(workers=2, filters=(Use("kv-busy", options),), scorers=(Use("load"),))
    first = site.route("a", tokens=900, start=0)
    second = site.route("b", tokens=900, start=5000)
    assert {first, second} == {Worker(1), Worker(2)}
    with pytest.raises(AllBusy) as error:
        site.route("c", start=9000)
    assert error.value.status == 529
    site.router.first_token("a", first)
    site.router.finished("a", first, "done")
    assert site.route("d", start=9000) == first


def test_an_adapter_is_served_where_it_can_be_and_preferably_where_it_is_loaded():
    cards = {1: {}, 2: {"capabilities": ("lora",)}, 3: {"capabilities": ("lora",)}, 4: {"adapter": "math"}}
    site = Site(cards=cards, filters=(Use("adapter"),), scorers=(Use("adapter-affinity"), Use("load", weight=0.1)))
    home = site.route("a", adapter="law")
    assert home in (Worker(2), Worker(3))
    assert all(site.route(f"b{i}", adapter="law") == home for i in range(5))
    assert site.route("c", adapter="math") == Worker(4)
    for worker in (2, 3):
        site.router.left(Worker(worker))
    with pytest.raises(NoWorker, match="does not have the adapter 'law'"):
        site.route("d", adapter="law")


def test_both_presets_start_and_send_a_prompt_back_to_where_it_is():
    for use in ("kv", "kv-plus"):
        site = Site(use=Use(use), cards={i: {"total_blocks": 10_000} for i in range(1, 5)})
        first = site.route("a", tokens=1600)
        site.router.first_token("a", first)
        site.router.finished("a", first, "done")
        assert site.route("b", tokens=1600) == first
        assert not site.router.faults
