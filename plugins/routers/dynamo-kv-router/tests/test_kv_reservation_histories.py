"""Reservations under every order of what gateways, workers and time may do."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from dynamo_core.cards import ModelCard
from dynamo_core.config.schema import Queue, Router, Use
from dynamo_core.context import Context
from dynamo_core.errors import DynamoError, IdInUse, NoWorker, RequestNotFound, Unavailable
from dynamo_core.pipeline.dispatch import Booking, Dispatcher
from dynamo_core.plugins import Plugins
from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.routing.router import Router as LiveRouter
from dynamo_core.routing.stack import build_stack
from dynamo_core.types import Instance
from dynamo_kv_router.reservations import Progress, Release, Reservations

IDS = [f"r{i}" for i in range(4)]
WORKERS = [Worker(1), Worker(2), Worker(2, 1)]
LOAD = ("bookings.in_flight", "bookings.prefill_tokens", "bookings.blocks", "kv.active_blocks", "engine.backlog", "engine.decoding", "engine.context",
        "engine.generated")  # fmt: skip
_plugins = Plugins.load()

acts = st.one_of(
    st.tuples(st.just("select"), st.sampled_from(IDS), st.integers(1, 60)),
    st.tuples(st.just("progress"), st.sampled_from(IDS), st.integers(0, 70)),
    st.tuples(st.just("release"), st.sampled_from(IDS), st.sampled_from(["done", "failed", "cancelled", "disconnected", "worker_overloaded"])),
    st.tuples(st.just("leave"), st.sampled_from(IDS), st.just(0)),
    st.tuples(st.just("pass"), st.just(""), st.floats(0.1, 12.0)),
    st.tuples(st.just("die"), st.just(""), st.sampled_from([1, 2])),
    st.tuples(st.just("come"), st.just(""), st.sampled_from([1, 2])),
)


class Fleet:
    """Routing as it is, with a clock that stands still; a model of what should be open stands beside it."""

    def __init__(self, queue: Queue) -> None:
        self.now = 1000.0
        stack = build_stack(Router(scorers=(Use("kv-plus"), Use("kv-cost"), Use("load")), facts=(Use("kv-index"),), queue=queue), _plugins)
        self.dispatcher = Dispatcher(LiveRouter("m", stack, clock=lambda: self.now), None, 5.0)  # type: ignore[arg-type]
        self.registry = CollectorRegistry()
        self.under_way: set[str] = set()
        self.reservations = Reservations(self.registry, self.under_way, silence=10.0, clock=lambda: self.now)
        self.heard: dict[str, float] = {}
        self.waiting: dict[str, tuple[asyncio.Task[Any], Context]] = {}
        for instance in (1, 2):
            self.come(instance)

    @property
    def router(self) -> LiveRouter:
        return self.dispatcher.router

    def come(self, id: int) -> None:
        instance = Instance(id=id, namespace="n", component="w", endpoint="generate", address=f"tcp://w{id}")
        self.dispatcher.instances[id] = instance
        for worker in WORKERS:
            if worker.instance == id:
                self.router.joined(worker, instance, ModelCard(name="m", total_blocks=1000, max_batched_tokens=64, dp_size=id))
                self.router.proven(worker)

    def die(self, id: int) -> None:
        for worker in WORKERS:
            if worker.instance == id:
                self.router.left(worker)
        self.dispatcher.instances.pop(id, None)

    async def act(self, what: str, id: str, how: Any) -> None:
        match what:
            case "select":
                context = Context(id)
                asked = RoutingRequest(id, "m", list(range(how)), how)
                task = asyncio.create_task(self.reservations.reserve(self.dispatcher, asked, context, 16))
                await turn()
                if id in self.waiting or id in self.heard:
                    assert isinstance(task.exception(), IdInUse)
                elif task.done() and (error := task.exception()) is not None:
                    assert isinstance(error, NoWorker), error
                else:
                    self.waiting[id] = task, context
            case "progress" if id in self.heard:
                self.reservations.progress(Progress(request_id=id, tokens=how))
                self.heard[id] = self.now
            case "progress":
                with pytest.raises(RequestNotFound):
                    self.reservations.progress(Progress(request_id=id, tokens=how))
            case "release" if id in self.heard:
                kind = "outcome" if how in ("done", "failed", "cancelled") else "error"
                self.reservations.release(Release(request_id=id, **{kind: how}))
                del self.heard[id]
            case "release":
                with pytest.raises(RequestNotFound):
                    self.reservations.release(Release(request_id=id))
            case "leave" if id in self.waiting:
                self.waiting[id][1].cancel("left")
            case "pass":
                self.now += how
                self.reservations.expire()
                self.heard = {id: at for id, at in self.heard.items() if at + 10.0 > self.now}
            case "die":
                self.die(how)
            case "come":
                self.come(how)
            case _:
                pass
        await turn()
        for id, (task, _) in list(self.waiting.items()):
            if task.done():
                del self.waiting[id]
                if task.exception() is None:
                    self.heard[id] = self.now
                else:
                    assert isinstance(task.exception(), DynamoError)
        assert len(self.reservations) == len(self.heard)
        assert self.under_way == self.heard.keys() | self.waiting.keys()
        assert sorted(request.id for request, *_ in self.router.open_here()) == sorted(self.heard)
        assert not self.router.faults


async def turn() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


async def test_whoever_speaks_of_a_request_keeps_it():
    fleet = Fleet(Queue(enabled=False))
    for id in ("speaks", "vanishes"):
        await fleet.act("select", id, 20)
    for _ in range(4):
        await fleet.act("pass", "", 4.0)
        await fleet.act("progress", "speaks", 0)
    assert fleet.heard.keys() == {"speaks"}
    await fleet.act("pass", "", 11.0)
    assert not fleet.heard


async def test_a_worker_that_leaves_when_it_was_just_selected_is_nobody_s_place():
    fleet = Fleet(Queue(enabled=False))
    book = fleet.dispatcher.book

    async def book_and_lose(asked: RoutingRequest, context: Context, block_size: int) -> Booking:
        booking = await book(asked, context, block_size)
        fleet.die(booking.worker.instance)
        return booking

    fleet.dispatcher.book = book_and_lose  # type: ignore[method-assign]
    asked = RoutingRequest("r", "m", [1] * 16, 16)
    with pytest.raises(Unavailable, match="ask again"):
        await fleet.reservations.reserve(fleet.dispatcher, asked, Context("r"), 16)
    assert not fleet.under_way
    assert not fleet.router.open_here()


@settings(max_examples=200, deadline=None)
@given(st.lists(acts, max_size=40), st.sampled_from([Queue(enabled=False), Queue(prefill_tokens=0, limit=2), Queue(prefill_tokens=64, wait_for="best")]))
def test_whatever_happens_in_whatever_order_nothing_is_booked_in_the_end(history: list[tuple[str, str, Any]], queue: Queue):
    async def run() -> None:
        fleet = Fleet(queue)
        for what, id, how in history:
            await fleet.act(what, id, how)
        for id in list(fleet.waiting):
            await fleet.act("leave", id, 0)
        await fleet.act("pass", "", 20.0)
        for instance in (1, 2):
            fleet.come(instance)
        assert not fleet.under_way
        rows = fleet.router.status()
        assert len(rows) == len(WORKERS)
        assert {name: [row["facts"][name] for row in rows] for name in LOAD} == {name: [0] * len(WORKERS) for name in LOAD}
        assert fleet.registry.get_sample_value("dynamo_router_reservations", {"model": "m"}) in (None, 0)
        fleet.dispatcher.close()

    asyncio.run(run())
