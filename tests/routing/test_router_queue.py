"""Requests wait in the router while no worker has room, and go in the order that was asked for."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from dynamo_core.cards import ModelCard
from dynamo_core.config.schema import Queue, QueueClass
from dynamo_core.config.schema import Router as RouterConfig
from dynamo_core.errors import AllBusy, NoWorker
from dynamo_core.plugins import Plugins
from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.routing.facts import BOOKED_PREFILL_TOKENS
from dynamo_core.routing.queue import RouterQueue, Ticket
from dynamo_core.routing.router import Router
from dynamo_core.routing.stack import build_stack
from dynamo_core.types import Hints, Instance

PLUGINS = Plugins.load()


class Site:
    """A router before `workers` idle workers, with a queue, in time that stands still."""

    def __init__(self, workers: int = 1, **settings) -> None:
        self.now = 0.0
        self.went: list[str] = []
        queue = Queue(**{"prefill_tokens": 0, **settings})
        self.router = Router("m", build_stack(RouterConfig(queue=queue), PLUGINS), clock=lambda: self.now)
        self.router.on_change = lambda: self.queue.changed()
        for i in range(workers):
            self.join(i + 1)
        self.queue = RouterQueue(self.router, queue, self, clock=lambda: self.now)
        self.away: Counter[str] = Counter()
        self.waits: list[float] = []
        self.where: dict[str, Worker] = {}

    def join(self, id: int) -> None:
        self.router.on_change, hook = None, self.router.on_change
        instance = Instance(id=id, namespace="n", component="c", endpoint="e", address="a")
        self.router.joined(Worker(id), instance, ModelCard(name="m", max_batched_tokens=1000))
        self.router.proven(Worker(id))
        self.router.on_change = hook

    def waited(self, ticket: Ticket, seconds: float) -> None:
        self.went.append(ticket.request.id)
        self.waits.append(seconds)
        assert ticket.decision is None or ticket.decision.worker is not None

    def turned_away(self, of: str, why: str) -> None:
        self.away[why] += 1

    def submit(self, name: str, tokens: int = 100, **hints) -> Ticket:
        return self.queue.submit(RoutingRequest(name, "m", prompt_tokens=tokens, hints=Hints(**hints)))

    def prefilled(self, ticket: Ticket) -> list[Ticket]:
        assert ticket.decision is not None
        assert ticket.decision.worker is not None
        self.router.first_token(ticket.request.id, ticket.decision.worker)
        return self.queue.release()


def test_a_request_goes_at_once_when_there_is_room():
    site = Site()
    ticket = site.submit("a")
    assert ticket.decision is not None
    assert not ticket.waiting
    assert site.waits == [0.0]


def test_a_request_waits_until_a_prefill_has_ended_and_its_record_says_how_long():
    site = Site()
    first, second = site.submit("a"), site.submit("b")
    assert second.waiting
    assert len(site.queue) == 1
    site.now = 2.5
    assert site.prefilled(first) == [second]
    assert second.decision is not None
    assert second.decision.waited == pytest.approx(2.5)
    assert "waited     2.500 s" in second.decision.render()


def drain(site: Site, *tickets: Ticket) -> list[str]:
    """End prefills, one after the other, until nobody waits; the order in which the others went."""
    running, before = [t for t in tickets if t.decision is not None], len(site.went)
    while running:
        running += site.prefilled(running.pop(0))
    return site.went[before:]


def test_fcfs_keeps_the_order_of_arrival_and_shortest_puts_short_ones_first():
    for order, expected in (("fcfs", ["b", "c", "d"]), ("shortest", ["d", "c", "b"])):
        site = Site(order=order, ageing=0.0)
        tickets = [site.submit("a"), site.submit("b", 900), site.submit("c", 500), site.submit("d", 10)]
        assert drain(site, *tickets) == expected


def test_higher_priority_goes_first_whatever_the_length():
    site = Site(order="shortest")
    tickets = [site.submit("a"), site.submit("b", 10), site.submit("c", 9000, priority=5)]
    assert drain(site, *tickets) == ["c", "b"]


def test_ageing_lets_a_long_request_pass_shorter_ones_that_come_much_later():
    site = Site(order="shortest", ageing=100.0)
    tickets = [site.submit("a"), site.submit("long", 1000)]
    site.now = 5.0
    tickets.append(site.submit("short", 600))
    site.now = 9.0
    tickets.append(site.submit("late", 300))
    assert drain(site, *tickets) == ["long", "short", "late"]


def test_the_longest_share_goes_first_when_it_is_asked_for():
    site = Site(order="shortest", longest_first=0.05, ageing=0.0, limit=5000)
    for i in range(200):
        drain(site, site.submit(f"warm{i}", 100))
    tickets = [site.submit("a"), site.submit("b", 50), site.submit("giant", 100_000), site.submit("c", 60)]
    assert drain(site, *tickets) == ["giant", "b", "c"]


def test_classes_share_what_goes_by_their_shares():
    site = Site(classes=(QueueClass("gold", share=3.0), QueueClass("free")), limit=5000)
    tickets = [site.submit("warm")]
    for i in range(80):
        tickets.append(site.submit(f"free{i}", 100, policy_class="free"))
        tickets.append(site.submit(f"gold{i}", 100, policy_class="gold"))
    first = drain(site, *tickets)[:80]
    assert sum(name.startswith("gold") for name in first) == pytest.approx(60, abs=2)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_class_that_was_idle_has_saved_nothing_up(order):
    site = Site(classes=(QueueClass("a"), QueueClass("b")), limit=5000)
    drain(site, site.submit("warm"), *[site.submit(f"a{i}", 100, policy_class="a") for i in range(100)])
    tickets = [site.submit("warm2", policy_class="a")]
    for i in range(40):
        tickets += [site.submit(f"{name}-{i}", 100, policy_class=name) for name in order]
    first = drain(site, *tickets)[:40]
    assert sum(name.startswith("b") for name in first) == pytest.approx(20, abs=2)


def test_requests_that_name_no_class_get_one_by_size():
    site = Site(classes=(QueueClass("short", up_to=200), QueueClass("rest")))
    assert site.submit("a", 150).of == "short"
    assert site.submit("b", 201).of == "rest"
    assert site.submit("c", 10, policy_class="rest").of == "rest"


@pytest.mark.parametrize(("settings", "cause"), [
    ({"limit": 2}, "limit"),
    ({"classes": (QueueClass("default", limit=2),)}, "class_limit"),
    ({"classes": (QueueClass("default", token_limit=299),)}, "token_limit"),
])
def test_over_a_limit_the_answer_is_529_and_says_which(settings, cause):
    site = Site(**settings)
    for name in "abc":
        site.submit(name)
    with pytest.raises(AllBusy) as error:
        site.submit("d")
    assert error.value.status == 529
    assert site.away == {cause: 1}
    assert len(site.queue) == 2


def test_patience_runs_out():
    site = Site(max_wait=10.0)
    site.submit("a")
    late = site.submit("b")
    site.now = 10.5
    assert site.queue.release() == [late]
    assert isinstance(late.error, AllBusy)
    assert not len(site.queue)


def test_a_cancelled_request_leaves_no_trace():
    site = Site()
    first, second, third = site.submit("a"), site.submit("b"), site.submit("c")
    site.queue.cancel(second)
    site.queue.cancel(second)
    assert drain(site, first, third) == ["c"]
    site.queue.cancel(third)


def test_a_new_worker_makes_room():
    site = Site()
    site.submit("a")
    second = site.submit("b")
    site.join(2)
    site.queue.changed()
    assert site.queue.release() == [second]


def test_a_request_that_nobody_can_take_does_not_wait():
    site = Site()
    for _ in range(2):
        with pytest.raises(NoWorker):
            site.submit("a", instance=99)
        site.submit("b")


def test_a_request_whose_worker_leaves_while_it_waits_is_told_so():
    site = Site(workers=3)
    for i in (1, 2):
        site.submit(f"{i}", instance=i)
    stuck = site.submit("stuck", instance=2)
    site.router.left(Worker(2))
    assert site.queue.release() == [stuck]
    assert isinstance(stuck.error, NoWorker)


def test_short_requests_join_a_prefill_and_long_ones_wait_for_its_end():
    site = Site(prefill_tokens=1000)
    first = site.submit("first", tokens=700)
    assert site.submit("long", tokens=5000).waiting
    assert site.submit("short", tokens=200).decision is not None
    assert site.submit("too much", tokens=200).waiting
    site.prefilled(first)
    assert site.went == ["first", "short", "too much"]  # 400 tokens are left
    site = Site(prefill_tokens=1000)
    assert site.submit("long", tokens=5000).decision is not None  # who is idle takes anything


@pytest.mark.parametrize("waits", [False, True])
def test_a_request_whose_blocks_are_fetched_waits_for_no_prefill_and_no_prefill_waits_for_it(waits: bool):
    site = Site(prefill_tokens=100)
    if waits:
        site.submit("reads", 90)
        site.submit("waits", 90)
    for name in ("first", "second"):
        assert site.queue.submit(RoutingRequest(name, "m", prompt_tokens=5000, role="decode", prefills=False)).decision is not None
    assert site.went == (["reads"] if waits else []) + ["first", "second"]
    if not waits:
        assert site.submit("reads", 90).decision is not None
    booked = next(part.component for part in site.router.providers if BOOKED_PREFILL_TOKENS in part.component.provides)
    assert booked.columns(RoutingRequest("q", "m"), [Worker(1)])[BOOKED_PREFILL_TOKENS] == (90,)


def test_waiting_for_the_best_worker_leaves_room_elsewhere_unused():
    for wait_for, goes in (("any", True), ("best", False)):
        site = Site(workers=2, wait_for=wait_for)
        one = site.submit("a", instance=1)
        assert one.decision is not None
        assert (site.submit("b", instance=1).decision is not None) is False
        assert (site.submit("c", instance=2).decision is not None) is True
        assert goes or len(site.queue) == 1


@pytest.mark.parametrize("seed", range(15))
def test_every_request_is_settled_once_and_no_worker_is_overfilled_whatever_happens(seed):
    rng = random.Random(seed)
    site = Site(workers=3, order=rng.choice(["fcfs", "shortest"]), wait_for=rng.choice(["any", "best"]), lookahead=rng.choice([1, 3, 8]), limit=20,
                classes=(QueueClass("a", share=2.0), QueueClass("b", up_to=300)))
    out: list[Ticket] = []
    waiting: list[Ticket] = []
    settled: Counter[str] = Counter()
    for i in range(300):
        site.now += rng.random()
        match rng.randrange(5):
            case 0 | 1:
                try:
                    ticket = site.queue.submit(RoutingRequest(f"{i}", "m", prompt_tokens=rng.randrange(1, 900), hints=Hints(priority=rng.randrange(2))),
                                               lambda t: settled.update([t.request.id]))
                except AllBusy:
                    assert len(site.queue) == 20
                    continue
                (out if ticket.decision else waiting).append(ticket)
            case 2 | 3 if out:
                ticket = out.pop(rng.randrange(len(out)))
                site.router.first_token(ticket.request.id, ticket.decision.worker)
                site.router.finished(ticket.request.id, ticket.decision.worker, "done")
                site.queue.release()
            case 4 if waiting and rng.random() < 0.3:
                site.queue.cancel(waiting.pop(rng.randrange(len(waiting))))
            case _:
                site.queue.release()
        out += [t for t in waiting if t.decision]
        waiting = [t for t in waiting if t.waiting]
        assert len(waiting) == len(site.queue)
        busy = Counter(t.decision.worker for t in out)
        # `any` says when somebody may go, and the stack says where, by its own lights.
        assert site.queue.settings.wait_for == "any" or all(count == 1 for count in busy.values())
    assert all(count == 1 for count in settled.values())


@pytest.mark.parametrize("how", ["leaves", "loses patience"])
def test_what_the_last_one_who_waited_was_promised_is_taken_back_when_he(how: str):
    site = Site(prefill_tokens=150, wait_for="best", max_wait=5.0)
    promised: list[str] = []
    site.router.parked = lambda request, worker, overlap_tokens: promised.append(request.id)
    site.router.unparked = promised.clear
    site.submit("a")
    waiting = site.submit("b")
    assert promised == ["b"]
    if how == "leaves":
        site.queue.cancel(waiting)
    else:
        site.now += 6.0
        site.queue.release()
    assert promised == []


def test_a_priority_beyond_all_numbers_goes_first_and_hurts_nobody():
    site = Site()
    first = site.submit("a")
    site.submit("b", priority=3)
    site.submit("c", priority=10**400)
    site.prefilled(first)
    assert site.went == ["a", "c"]
