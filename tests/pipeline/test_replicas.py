"""Two frontends before one fleet count each other's requests."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator
from types import SimpleNamespace

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from dynamo_core.cards import ModelCard
from dynamo_core.config.schema import Queue, Router, Use
from dynamo_core.context import Context
from dynamo_core.events.contract import Event
from dynamo_core.kv import Hasher
from dynamo_core.kv.prehashed import Prehashed
from dynamo_core.pipeline.catalog import FleetCatalog
from dynamo_core.pipeline.replicas import Replica, Replicas
from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.routing.decide import Part, Stack
from dynamo_core.routing.facts import BOOKED_PREFILL_TOKENS, IN_FLIGHT
from dynamo_core.routing.router import Router as LiveRouter
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.testing.cluster import Cluster, read_all
from dynamo_core.types import Hints, Instance, Request, Stops, TextOptions


@contextlib.asynccontextmanager
async def second_frontend(cluster: Cluster) -> AsyncGenerator[FleetCatalog]:
    async with Runtime.open(cluster.config, cluster.plugins) as runtime, FleetCatalog.open(runtime, CollectorRegistry()) as catalog:
        workers = sum(member is not None for member in cluster.members)
        await until(lambda: sum(w["proven"] for m in catalog.status()["models"].values() for w in m["workers"]) == workers)
        yield catalog


async def until(condition) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.01)


def router_of(catalog: FleetCatalog) -> LiveRouter:
    return catalog.models()[0].dispatchers["aggregated"].router


def seen(catalog: FleetCatalog, fact=IN_FLIGHT) -> int:
    return sum(worker["facts"][fact.name] for worker in router_of(catalog).status())


async def start(catalog: FleetCatalog, id: str, tokens: int = 20, tokens_out: int = 100):
    request = Request(id=id, model=catalog.models()[0].name, token_ids=list(range(65, 65 + tokens)), stops=Stops(max_tokens=tokens_out))
    return await catalog.models()[0].start(request, TextOptions(), Context(id))


@pytest.mark.parametrize("plane", ["in-process", "zmq"])
async def test_what_one_frontend_sends_the_other_counts_until_it_ends(plane, tmp_path):
    event_plane = None if plane == "in-process" else Use("zmq")
    async with Cluster.up(workers=2, engine="echo", options={"delay": 0.05}, router=Router(use=Use("least-loaded")), event_plane=event_plane) as cluster:
        async with second_frontend(cluster) as other:
            running = [await start(cluster.catalog, f"same-id-{i}", tokens_out=20) for i in range(4)]
            await until(lambda: seen(other) == 4)
            theirs = await start(other, "same-id-0", tokens_out=20)  # ids of two frontends may agree
            await until(lambda: seen(cluster.catalog) == 5)
            for generation in running:
                await read_all(generation)
            await read_all(theirs)
            await until(lambda: seen(other) == seen(cluster.catalog) == 0)
            assert seen(other, BOOKED_PREFILL_TOKENS) == seen(cluster.catalog, BOOKED_PREFILL_TOKENS) == 0


async def test_a_new_frontend_learns_what_is_under_way_and_what_a_lost_one_sent_is_forgotten():
    async with Cluster.up(workers=2, engine="echo", options={"delay": 0.4}, router=Router(use=Use("least-loaded"))) as cluster:
        running = [await start(cluster.catalog, f"r{i}") for i in range(3)]
        async with second_frontend(cluster) as other:
            await until(lambda: seen(other) == 3)
            mine = await start(other, "mine")
            await until(lambda: seen(cluster.catalog) == 4)
            mine.cancel()
            await until(lambda: seen(cluster.catalog) == 3)
            lost = [await start(other, f"lost{i}") for i in range(2)]
            await until(lambda: seen(cluster.catalog) == 5)
        await until(lambda: seen(cluster.catalog) == 3)
        for generation in (*running, *lost):
            generation.cancel()
        await until(lambda: seen(cluster.catalog) == 0)


async def test_two_frontends_that_send_at_once_share_the_workers_evenly():
    async with Cluster.up(workers=4, engine="echo", options={"delay": 0.4}, router=Router(use=Use("least-loaded"))) as cluster:
        async with second_frontend(cluster) as other:
            sent = []
            for i in range(8):
                sent.append(await start((cluster.catalog, other)[i % 2], f"r{i}"))
                await until(lambda n=i + 1: seen(cluster.catalog) == seen(other) == n)
            loads = [worker["facts"][IN_FLIGHT.name] for worker in router_of(other).status()]
            assert loads == [2, 2, 2, 2]
            for generation in sent:
                generation.cancel()


class Names:
    """A provider that names prompts, keeps what it hears of requests, and has something to hand on."""

    provides = ()

    def __init__(self, known: list[bytes]) -> None:
        self.hasher = Hasher(b"shared", 16)
        self.booked_here: dict[str, RoutingRequest] = {}
        self.known = known

    def columns(self, request, workers):
        return {}

    def named(self, request):
        return Prehashed(self.hasher.keys(list(request.token_ids)), len(request.token_ids), 16, self.hasher.fingerprint)

    def booked(self, request, worker, overlap_tokens):
        self.booked_here[request.id] = request

    def first_token(self, request_id, worker, cached_tokens): ...

    def grew(self, request_id, worker, output_tokens): ...

    def finished(self, request_id, worker, outcome):
        self.booked_here.pop(request_id)

    def state(self):
        return self.known

    def learn(self, message):
        self.known.append(message)


class Wire:
    """A publisher whose messages others get as they were sent."""

    def __init__(self, id: int) -> None:
        self.id, self.sent, self.others = id, [], []

    def publish(self, payload: bytes) -> int:
        self.sent.append(payload)
        for other in self.others:
            other.heard(self.id, msgspec.msgpack.decode(payload)[2])
        return len(self.sent)


def replica(id: int, known: list[bytes]) -> tuple[Replica, Names, Wire]:
    names, wire = Names(known), Wire(id)
    router = LiveRouter("m", Stack(providers=(Part("facts", "names", names, "names"),)))
    for i in range(3):
        router.joined(Worker(i), Instance(id=i, namespace="n", component="c", endpoint="e", address="a"), ModelCard(name="m"))
    router.share = found = Replica(router)
    return found, names, wire


async def test_a_newcomer_gets_thousands_of_long_prompts_in_messages_of_bounded_size():
    (old, theirs, wire), (new, ours, back) = replica(1, [b"x" * 90_000] * 12), replica(2, [])
    wire.others, back.others = [new], [old]
    old.connected(wire)
    rng = random.Random(1)
    for i in range(60):
        prompt = [rng.randrange(1000) for _ in range(16 * 2048)]
        old.router.booked(RoutingRequest(f"r{i}", "m", prompt, len(prompt), hints=Hints(session=f"s{i}")), Worker(i % 3), 16)
    await asyncio.sleep(0)
    wire.sent.clear()
    new.connected(back)
    await until(lambda: ours.known == theirs.known)
    assert len(ours.booked_here) == 60
    assert max(map(len, wire.sent)) < 320_000
    for id, request in theirs.booked_here.items():
        told = ours.booked_here[f"1/{id}"]
        assert told.hints.session == request.hints.session
        assert told.token_ids.keys_of(16).tolist() == ours.hasher.keys(list(request.token_ids)).tolist()
    new.missed()  # a lost message costs bookings again, and not everything
    told = len(wire.sent)
    await until(lambda: len(wire.sent) > told)
    assert len(ours.known) == 12
    assert len(ours.booked_here) == 60
    wire.others.append(third := replica(3, [])[0])
    third.connected(after := Wire(3))
    after.others = [old]
    third._say(["?", True])  # a newcomer: others do not learn twice
    await until(lambda: len(third.router.state()) == 12)
    assert len(ours.known) == 12
    old.router.finished("r0", Worker(0), "done")
    new.left(1)
    assert not ours.booked_here


@pytest.mark.parametrize("item", [["b", "id", 1, 0], ["b", "id", 1, 0, 16, 0, None, None, [16, 5, b"short"]], ["b", "id", 1, 0, 16, 0, None, None, [0, 0, b""]],
                                  ["p", "nobody", b"x"], ["p", "names"], ["s", []], ["g", "x", 9, 9, 1], [], ["?", 1], ["zzz"]])
async def test_nonsense_of_another_frontend_breaks_nothing(item):
    found, _, wire = replica(1, [])
    found.connected(wire)
    found.heard(7, [item])
    assert all(len(request.token_ids) == 0 for request, *_ in found.router.open_here())
    assert not found.router.faults


@pytest.mark.parametrize("payload", [b"\xc1", b"\x93\xa1\xff\xa1r\x90", b"\x93\xa1m\xa1r" + b"\x91" * 200_000, b"\x91"])
async def test_a_message_that_is_no_bookings_at_all_does_not_end_the_subscription(payload):
    replicas = Replicas(SimpleNamespace(id=1, on_new_lease=lambda again: None))  # type: ignore[arg-type]
    replicas._take("backend", Event(2, 0, "dynamo/backend/bookings", payload))


async def test_blocks_that_one_frontend_has_fetched_are_no_prefill_for_the_other_either():
    slow = Use("sim", {"role": "decode", "transfer_ms": 60_000.0})
    router = Router(use=Use("least-loaded"), queue=Queue(prefill_tokens=0))
    async with Cluster.up(workers=1, engine=slow, router=router) as cluster, second_frontend(cluster) as other:
        request = Request(id="r", model="sim", token_ids=list(range(65, 165)), stops=Stops(max_tokens=2), transfer={"tokens": 100})
        stream = cluster.catalog.offered()["sim"].tokens(request, Context("r"), "decode")
        await stream.start()

        def facts() -> dict[str, float]:
            return other.offered()["sim"].dispatcher("decode").router.status()[0]["facts"]

        await until(lambda: facts()[IN_FLIGHT.name] == 1)
        assert facts()[BOOKED_PREFILL_TOKENS.name] == 0
        stream.cancel("enough")
        await until(lambda: facts()[IN_FLIGHT.name] == 0)
