"""One router: fleet, health, bookings, events, reload and records."""

import math
from collections import Counter

import attrs
import msgspec
import pytest

from dynamo_core.cards import ModelCard
from dynamo_core.config.schema import Router as RouterConfig
from dynamo_core.config.schema import Use
from dynamo_core.errors import AllBusy, NoWorker
from dynamo_core.plugins import Plugins
from dynamo_core.routing import facts
from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.routing.decide import Part, Stack
from dynamo_core.routing.record import Decision
from dynamo_core.routing.router import Router
from dynamo_core.routing.stack import build_stack
from dynamo_core.types import Hints, Instance, Load

PLUGINS = Plugins.load()


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def stack(use="least-loaded", **router):
    return build_stack(RouterConfig(use=Use(use), **router), PLUGINS)


def instance(i):
    return Instance(id=i, namespace="dynamo", component="backend", endpoint="generate", address="tcp://x")


def fleet_of(n, use="least-loaded", *, card=None, proven=True, **options):
    router = Router("m", use if isinstance(use, Stack) else stack(use), **options)
    for i in range(1, n + 1):
        join(router, Worker(i), card, proven=proven)
    return router


def join(router, worker, card=None, *, proven=True):
    router.joined(worker, instance(worker.instance), card or ModelCard(name="m", max_sequences=4, total_blocks=1000, block_size=16))
    if proven:
        router.proven(worker)


def request(i=0, **fields):
    return RoutingRequest(f"r{i}", "m", list(range(100)), **fields)


def send(router, i=0, **fields):
    """Route and book, as the pipeline does."""
    asked = request(i, **fields)
    decision = router.route(asked)
    router.booked(asked, decision.worker, decision.overlap_tokens)
    return decision


# ------------------------------------------------------------------ policies at work


def test_round_robin_gives_every_worker_its_turn():
    router = fleet_of(5, "round-robin")
    for _ in range(4):
        assert {send(router, i).worker.instance for i in range(5)} == {1, 2, 3, 4, 5}


def test_a_worker_that_joins_late_is_next_but_only_once_in_a_round():
    router = fleet_of(3, "round-robin")
    for i in range(300):
        send(router, i)
    join(router, Worker(9))
    assert send(router).worker == Worker(9)
    assert Counter(send(router).worker.instance for _ in range(8)) == {1: 2, 2: 2, 3: 2, 9: 2}


def test_least_loaded_keeps_the_fleet_level_and_follows_what_ends():
    router = fleet_of(4)
    decisions = [send(router, i) for i in range(8)]
    assert Counter(d.worker.instance for d in decisions) == {1: 2, 2: 2, 3: 2, 4: 2}
    for i, d in enumerate(decisions):
        if d.worker == Worker(3):
            router.finished(f"r{i}", d.worker, "done")
    assert [send(router, 100 + k).worker for k in range(2)] == [Worker(3), Worker(3)]


def test_of_two_equals_the_one_with_fewer_blocks_is_taken():
    router = fleet_of(2)
    router.booked(RoutingRequest("long", "m", (), 8000), Worker(1), 0)
    router.booked(RoutingRequest("short", "m", (), 16), Worker(2), 0)
    assert {router.route(request()).worker for _ in range(20)} == {Worker(2)}


def test_random_reaches_everybody_and_power_of_two_spares_the_fullest():
    assert len({fleet_of(6, "random", seed=s).route(request()).worker for s in range(60)}) == 6
    router = fleet_of(4, "power-of-two")
    for i in range(10):
        router.booked(request(i), Worker(2), 0)
    assert Worker(2) not in {router.route(request()).worker for _ in range(100)}


def test_direct_does_as_it_is_told_and_nothing_else():
    router = fleet_of(3, "direct")
    assert router.route(request(hints=Hints(instance=2))).worker == Worker(2)
    with pytest.raises(NoWorker, match="names no instance"):
        router.route(request())
    with pytest.raises(NoWorker, match="another instance"):
        router.route(request(hints=Hints(instance=77)))


def test_a_rank_can_be_pinned_and_prefill_has_a_pin_of_its_own():
    router = Router("m", stack("round-robin"), role="prefill")
    for i in (1, 2):
        for rank in (0, 1):
            join(router, Worker(i, rank), ModelCard(name="m", dp_size=2))
    assert router.route(request(role="prefill", hints=Hints(instance=1, prefill_instance=2, dp_rank=1))).worker == Worker(2, 1)
    assert router.label(Worker(2, 1)) == "backend-000002/1"


def test_taints_are_required_or_preferred_by_the_caller():
    router = Router("m", build_stack(RouterConfig(filters=(Use("taints"),), scorers=(Use("preferred-taints"),)), PLUGINS))
    for i, taints in enumerate([("spot",), ("zone=a",), ("zone=a", "spot"), ()], 1):
        join(router, Worker(i), ModelCard(name="m", taints=taints))
    assert {router.route(request(hints=Hints(required_taints=("zone=a", "spot")))).worker for _ in range(5)} == {Worker(3)}
    assert {router.route(request(hints=Hints(preferred_taints={"zone=a": 2.0, "spot": -1.0}))).worker for _ in range(9)} == {Worker(2)}
    with pytest.raises(NoWorker, match="lacks the required taint 'gpu=x'"):
        router.route(request(hints=Hints(required_taints=("gpu=x",))))


# ------------------------------------------------------------------ determinism


def test_the_same_seed_gives_the_same_choices_whoever_joined_first():
    def run(order, seed):
        router = Router("m", stack("random"), seed=seed)
        for i in order:
            join(router, Worker(i))
        return [router.route(request()).worker for _ in range(50)]

    assert run([1, 2, 3, 4], 7) == run([4, 2, 1, 3], 7)
    assert run([1, 2, 3, 4], 7) != run([1, 2, 3, 4], 8)


def test_a_dry_run_says_what_route_would_do_and_changes_nothing():
    router = fleet_of(4, "round-robin")
    for i in range(20):
        predicted = router.dry_run(request())
        assert predicted.dry_run
        assert send(router, i).worker == predicted.worker
    assert router.ring.get(predicted.id) is predicted


def test_a_dry_run_without_workers_explains_instead_of_raising():
    decision = Router("m", stack()).dry_run(request())
    assert decision.worker is None
    assert decision.reason == "no worker is registered"


# ------------------------------------------------------------------ health


def test_a_worker_gets_nothing_before_it_is_proven():
    router = fleet_of(1, proven=False)
    with pytest.raises(NoWorker, match="backend-000001: no canary request has come back from it yet"):
        router.route(request())
    router.proven(Worker(1))
    assert router.route(request()).worker == Worker(1)


def test_inhibition_ends_by_itself_and_the_longer_one_counts():
    clock = Clock()
    router = fleet_of(1, clock=clock)
    router.inhibit(Worker(1), 5.0, "disconnected")
    router.inhibit(Worker(1), 1.0, "slow")
    clock.now += 2
    with pytest.raises(NoWorker, match=r"inhibited for 3\.0 s more: disconnected"):
        router.route(request())
    clock.now += 3.5
    assert router.route(request()).columns[facts.INHIBITED] == (0.0,)
    assert router.route(request()).columns[facts.INHIBITED_WHY] == ("",)


def test_a_draining_worker_and_one_that_failed_this_request_get_nothing_new():
    router = fleet_of(3)
    router.draining(Worker(1))
    assert router.route(request(failed=(Worker(2),))).worker == Worker(3)


def test_a_worker_that_left_is_forgotten_and_its_label_stays_in_old_records():
    router = fleet_of(2)
    decision = router.route(request())
    router.left(decision.worker)
    router.left(decision.worker)
    assert decision.worker not in router.workers
    assert f"chosen     backend-{decision.worker}" in decision.render()
    router.finished("r0", decision.worker, "failed")
    router.inhibit(decision.worker, 1, "late news")
    assert router.route(request()).worker != decision.worker


def test_nobody_at_all_is_a_503_and_everybody_full_is_a_529():
    router = Router("m", stack(filters=(Use("not-full"),)))
    with pytest.raises(NoWorker, match="no worker is registered") as nobody:
        router.route(request())
    assert not isinstance(nobody.value, AllBusy)
    join(router, Worker(1))
    join(router, Worker(2), proven=False)
    for i in range(4):
        send(router, i)
    with pytest.raises(AllBusy, match="4 requests in progress of 4 sequences"):
        router.route(request())
    router.draining(Worker(1))
    with pytest.raises(NoWorker) as gone:
        router.route(request())
    assert not isinstance(gone.value, AllBusy)


def test_a_refused_request_has_a_record_too():
    router = fleet_of(1, proven=False)
    with pytest.raises(NoWorker):
        router.route(request())
    assert "x backend-000001  ready: no canary" in router.ring.get("r0").render()


# ------------------------------------------------------------------ bookings and reports


def booked(router):
    columns = router.dry_run(request()).columns
    return tuple(columns[fact][0] for fact in (facts.IN_FLIGHT, facts.BOOKED_PREFILL_TOKENS, facts.BOOKED_BLOCKS))


def test_bookings_follow_a_request_from_prompt_to_end():
    router = fleet_of(1)
    asked = request()
    router.booked(asked, Worker(1), 32)
    assert booked(router) == (1, 68, 7)
    router.first_token("r0", Worker(1), 48)
    assert booked(router) == (1, 0, 7)
    router.grew("r0", Worker(1), 30)
    assert booked(router) == (1, 0, 9)
    router.finished("r0", Worker(1), "cancelled")
    router.finished("r0", Worker(1), "cancelled")
    assert booked(router) == (0, 0, 0)


def test_joining_again_brings_another_card_and_keeps_health_and_bookings():
    router = fleet_of(1)
    router.booked(request(), Worker(1), 0)
    join(router, Worker(1), ModelCard(name="m", max_sequences=77, block_size=16), proven=False)
    decision = router.route(request())
    assert decision.columns[facts.MAX_SEQUENCES] == (77,)
    assert booked(router) == (1, 100, 7)
    router.finished("r0", Worker(1), "done")
    assert booked(router) == (0, 0, 0)


def test_the_status_shows_health_and_facts_of_every_worker():
    router = fleet_of(2)
    router.booked(request(), Worker(2), 0)
    router.draining(Worker(1))
    first, second = router.status()
    assert (first["label"], first["draining"], second["draining"]) == ("backend-000001", True, False)
    assert second["facts"]["bookings.in_flight"] == 1


def test_news_of_requests_that_nobody_booked_is_ignored():
    router = fleet_of(1)
    router.first_token("ghost", Worker(1), 1)
    router.grew("ghost", Worker(1), 100)
    router.finished("ghost", Worker(1), "done")
    assert booked(router) == (0, 0, 0)


def test_engine_reports_arrive_by_events_and_grow_old():
    clock = Clock()
    router = Router("m", stack(filters=(Use("not-full"),)), clock=clock)
    assert router.event_topics() == {"load"}
    join(router, Worker(1), ModelCard(name="m", dp_size=2))
    join(router, Worker(1, 1), ModelCard(name="m", dp_size=2))
    router.on_event("load", 1, msgspec.msgpack.encode(Load(running=3, waiting=2, kv_used_blocks=99, kv_total_blocks=100, dp_rank=1)))
    clock.now += 4
    decision = router.route(request())
    assert decision.worker == Worker(1, 0)
    assert decision.rejected == [(1, "not-full", "KV cache 99% in use, limit 95%")]
    assert decision.columns[facts.ENGINE_WAITING] == (0, 2)
    assert decision.columns[facts.ENGINE_REPORT_AGE] == (math.inf, 4.0)
    clock.now += 100
    assert router.route(request()).rejected == []
    router.on_gap("load", 1, 3)
    router.on_event("load", 777, msgspec.msgpack.encode(Load()))
    assert not router.faults


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x00" * 100, msgspec.msgpack.encode(["a", "b"]), msgspec.msgpack.encode({"running": 1})])
def test_a_garbage_report_is_counted_and_hurts_nobody(payload):
    router = fleet_of(1, stack(filters=(Use("not-full"),)))
    router.on_event("load", 1, payload)
    assert router.faults["facts.engine-load"] == 1
    assert router.route(request()).worker == Worker(1)


# ------------------------------------------------------------------ reload


def test_swap_keeps_what_is_known_and_counts_the_generation():
    router = fleet_of(3, "round-robin")
    first = send(router, 0)
    router.first_token("r0", first.worker, 0)
    router.grew("r0", first.worker, 50)
    router.inhibit(Worker(2), 1000, "sick")
    before = router.route(request(1))
    router.swap(stack("least-loaded"))
    decision = router.route(request(2))
    row = decision.workers.index(first.worker)
    assert (before.generation, decision.generation) == (1, 2)
    assert decision.columns[facts.IN_FLIGHT][row] == 1
    assert decision.columns[facts.BOOKED_PREFILL_TOKENS][row] == 0
    assert decision.columns[facts.BOOKED_BLOCKS][row] == 10
    assert [by for _, by, _ in decision.rejected] == ["ready"]
    assert max(decision.columns[facts.TURN]) >= 1, "the provider of facts about the fleet kept its state"
    router.finished("r0", first.worker, "done")
    assert max(router.route(request(3)).columns[facts.IN_FLIGHT]) == 0


# ------------------------------------------------------------------ records


def test_the_record_keeps_neither_the_prompt_nor_the_cache_salt():
    router = fleet_of(1)
    decision = router.route(attrs.evolve(request(), cache_salt="tenant-7"))
    assert decision.request.token_ids == ()
    assert decision.request.prompt_tokens == 100
    assert decision.request.cache_salt is None
    assert "tenant-7" not in decision.to_json()


class Scribbles:
    needs = ()

    def score(self, request, fleet):
        request.hints.preferred_taints["mine"] = 1.0
        return [0.0] * len(fleet)


@pytest.mark.parametrize("wanted", [Hints(), Hints(preferred_taints={"gpu": 1.0})])
def test_a_policy_cannot_change_the_hints_of_the_request_for_others(wanted):
    given = dict(wanted.preferred_taints)
    router = fleet_of(2, Stack(stack().filters, (Part("scorer", "scribbles", Scribbles()),), None, None, stack().providers))
    asked = request(hints=wanted)
    decision = router.route(asked)
    assert asked.hints.preferred_taints == given
    assert Hints().preferred_taints == {}
    assert bool(decision.faults) == bool(given)
    if given:
        assert decision.request.hints == wanted
        assert Decision.from_json(decision.to_json()).request.hints == wanted
