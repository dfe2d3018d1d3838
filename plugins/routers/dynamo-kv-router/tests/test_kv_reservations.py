"""Requests that somebody else sends: a worker is selected and booked, and the router is told how the request goes."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import attrs
import httpx
import msgspec
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from dynamo_core.config.schema import Migration, Queue, Router, Status, Use
from dynamo_core.context import Context
from dynamo_core.errors import AllBusy, Cancelled, IdInUse, RequestError, RequestNotFound
from dynamo_core.pipeline.catalog import FleetCatalog
from dynamo_core.pipeline.dispatch import Dispatcher
from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.runtime.status import serve_status
from dynamo_core.testing.cluster import Cluster, read_all
from dynamo_core.types import Request, Stops
from dynamo_kv_router.reservations import Progress, Release, Reservations
from dynamo_kv_router.service import Question, RouterService
from dynamo_kv_router.web import router_app

PROMPT = list(range(65, 65 + 160))
"""Ten blocks."""
LOAD = ("bookings.in_flight", "bookings.prefill_tokens", "bookings.blocks", "kv.active_blocks", "engine.backlog", "engine.decoding", "engine.context",
        "engine.generated")  # fmt: skip
EVERY_FACT = Router(scorers=(Use("kv-plus"), Use("kv-cost"), Use("load")), facts=(Use("kv-index"),))
"""About load."""
ONE_AT_A_TIME = attrs.evolve(EVERY_FACT, queue=Queue(prefill_tokens=0, limit=1))


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.005)


@attrs.define
class Site:
    cluster: Cluster
    service: RouterService
    http: httpx.AsyncClient

    @property
    def dispatcher(self) -> Dispatcher:
        model = self.cluster.catalog.models()[0]
        return model.dispatcher("aggregated")

    def facts(self, name: str) -> list[Any]:
        return [row["facts"][name] for row in self.dispatcher.router.status()]

    def load(self) -> dict[str, float]:
        """Of all workers together, what is not nothing."""
        return {name: total for name in LOAD if (total := sum(self.facts(name)))}

    def metric(self, name: str, **labels: str) -> float | None:
        return self.cluster.registry.get_sample_value(name, {"model": self.cluster.model.name, **labels})

    async def select(self, id: str = "r", prompt: list[int] = PROMPT, **more: Any) -> dict[str, Any]:
        answer = await self.http.post("/select", json={"request_id": id, "token_ids": prompt, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()


@contextlib.asynccontextmanager
async def site(router: Router = EVERY_FACT, *, silence: float = 60.0, workers: int = 2, **about: Any) -> AsyncGenerator[Site]:
    async with Cluster.up(workers=workers, engine="echo", router=router, **about) as cluster:
        service = RouterService(cluster.catalog, cluster.registry, silence=silence)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=router_app(service)), base_url="http://router") as http:
            yield Site(cluster, service, http)
        assert not cluster.model.dispatcher("aggregated").router.faults  # type: ignore[attr-defined]


async def test_a_selected_request_is_booked_as_one_that_is_sent_and_its_words_correct_the_booking():
    async with site() as it:
        answer = await it.select()
        row = next(w for w in it.dispatcher.router.status() if w["label"] == answer["worker"]["label"])
        assert answer["request_id"] == "r"
        assert answer["overlap_tokens"] == 0
        assert int(answer["worker"]["instance"], 16) == row["worker"][0]
        assert answer["worker"]["address"] == it.dispatcher.instances[row["worker"][0]].address
        assert "url" not in answer["worker"]
        assert row["facts"]["bookings.prefill_tokens"] == row["facts"]["engine.context"] == 160
        assert row["facts"]["bookings.blocks"] == row["facts"]["kv.active_blocks"] == 10
        assert it.metric("dynamo_router_reservations") == 1

        assert (await it.http.post("/requests/r", json={"tokens": 0})).status_code == 204
        assert sum(it.facts("bookings.prefill_tokens")) == 160
        assert (await it.http.post("/requests/r")).status_code == 204
        assert it.load() == {"bookings.in_flight": 1, "bookings.blocks": 10, "kv.active_blocks": 10, "engine.decoding": 1, "engine.context": 161,
                             "engine.generated": 1}  # fmt: skip
        for tokens, blocks in ((5, 10), (20, 12), (19, 12), (0, 12), (40, 13)):
            assert (await it.http.post("/requests/r", json={"tokens": tokens})).status_code == 204
            assert sum(it.facts("bookings.blocks")) == blocks
        assert sum(it.facts("engine.generated")) == 40

        assert (await it.http.delete("/requests/r")).status_code == 204
        assert it.load() == {}
        assert it.metric("dynamo_router_reservations") == 0
        assert it.metric("dynamo_router_reservations_ended_total", outcome="done") == 1


async def test_a_worker_that_only_fetches_what_another_one_reads_has_nothing_to_prefill():
    async with Cluster.up(workers=0, engine="sim", router=ONE_AT_A_TIME) as cluster:
        service = RouterService(cluster.catalog, cluster.registry, silence=60.0)
        for role in ("prefill", "decode"):
            await cluster.add(engine=Use("sim", {"role": role, "block_size": 16}), name=role)
        await until(lambda: cluster.catalog.models() and cluster.catalog.not_ready() is None)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=router_app(service)), base_url="http://router") as http:
            for role, waiting in (("prefill", 160), ("decode", 0)):
                assert (await http.post("/select", json={"request_id": role, "token_ids": PROMPT, "role": role})).status_code == 200
                (row,) = cluster.catalog.models()[0].dispatcher(role).router.status()
                assert (row["facts"]["bookings.prefill_tokens"], row["facts"]["bookings.blocks"]) == (waiting, 10)
            # Behind a queue that lets in one prompt at a time, the next one is not held up.
            assert (await http.post("/select", json={"request_id": "two", "token_ids": PROMPT, "role": "decode"})).status_code == 200


async def test_it_is_booked_to_the_same_worker_with_the_same_figures_as_if_it_were_dispatched():
    async with site(options={"delay": 0.5}) as it:
        first = await it.service.select(Question(request_id="warm", token_ids=PROMPT), Context("warm"))
        it.service.release(Release(request_id="warm"))
        dispatched = await it.cluster.generate(PROMPT, max_tokens=1)
        of_dispatch = it.load()
        dispatched.cancel()
        await until(lambda: not it.load())
        selected = await it.select()
        assert {**it.load(), "engine.backlog": 0} == {**of_dispatch, "engine.backlog": 0}
        assert list(dispatched.workers) == [selected["worker"]["label"]] == [first["worker"]["label"]]
        assert selected["overlap_tokens"] == it.cluster.catalog.decision(dispatched.decisions[0])["overlap_tokens"] > 0  # type: ignore[index]


@pytest.mark.parametrize("when", ["first", "later", "last"])
async def test_its_decision_tells_the_outcome_and_what_the_engine_had_and_prediction_is_measured(when: str):
    async with site() as it:
        answer = await it.select()
        found = {"cached_tokens": 48}
        await it.http.post("/requests/r", json=found if when == "first" else {})
        await it.http.post("/requests/r", json={"tokens": 20, **(found if when == "later" else {})})
        await it.http.delete("/requests/r", params={"outcome": "cancelled", **(found if when == "last" else {})})
        record = (await it.http.get("/debug/decisions/r")).json()
        assert (record["id"], record["cached_tokens"], record["outcome"]) == (answer["decision"], 48, "cancelled")
        assert f"served by  {answer['worker']['label']}, cancelled" in record["text"]
        assert it.metric("dynamo_router_found_cached_tokens_total") == 48
        assert it.metric("dynamo_router_prediction_error_tokens_count") == 1
        assert it.metric("dynamo_router_reservations_ended_total", outcome="cancelled") == 1


async def test_prices_are_learned_from_when_its_first_token_and_its_growth_are_told():
    async with site(workers=1) as it:
        guess = it.facts("engine.step_ms")
        for i in range(4):
            await it.select(f"r{i}", [65 + i, *PROMPT])
            await asyncio.sleep(0.02)
            it.service.progress(Progress(request_id=f"r{i}"))
            await asyncio.sleep(0.02)
            it.service.progress(Progress(request_id=f"r{i}", tokens=17))
            it.service.release(Release(request_id=f"r{i}"))
        assert it.facts("engine.samples") == [3]  # of prefill; the last one could still share its pass with another
        assert it.facts("engine.step_ms") != guess


async def test_a_session_is_bound_by_it_and_the_card_s_url_is_told():
    async with site(Router(filters=(Use("session"),), scorers=(Use("turn"),)), workers=3) as it:
        for member in it.cluster.catalog.models()[0].members.values():
            member.card = msgspec.structs.replace(member.card, runtime={"url": f"http://gpu-{member.instance.id:x}:8000"})
        home = (await it.select("r0", hints={"session": "s"}))["worker"]
        assert home["url"] == f"http://gpu-{int(home['instance'], 16):x}:8000"
        others = {(await it.select(f"other {i}"))["worker"]["label"] for i in range(3)}
        assert len(others) == 3
        assert (await it.select("r1", hints={"session": "s"}))["worker"] == home


async def test_an_id_means_one_request_at_a_time_and_what_is_left_out_is_made_up():
    async with site(ONE_AT_A_TIME, workers=1) as it:
        await it.select("same")
        waiting = asyncio.create_task(it.select("waits", hints={"priority": 1}))
        await until(lambda: it.dispatcher.waiting)
        for id in ("same", "waits"):
            refused = await it.http.post("/select", json={"request_id": id, "token_ids": PROMPT})
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "id_in_use")
            assert f"{id!r} is under way" in refused.json()["error"]["message"]
        it.service.release(Release(request_id="same"))
        await waiting
        it.service.release(Release(request_id="waits"))
        ids = {(await it.select("same"))["request_id"]}
        it.service.progress(Progress(request_id="same"))
        ids.add(made_up := (await it.select(""))["request_id"])
        it.service.progress(Progress(request_id=made_up))
        assert len(ids) == 2
        # A stream of that id gets a booking of its own.
        request = Request(id="same", model=it.cluster.model.name, token_ids=PROMPT, stops=Stops(max_tokens=3))
        async for _ in it.service.generate(request, Context("same")):
            assert sum(it.facts("bookings.in_flight")) == 3
        assert sum(it.facts("bookings.in_flight")) == 2


async def test_words_about_unknown_requests_and_words_that_mean_nothing_change_nothing():
    async with site() as it:
        await it.select("a/b c")
        before = it.load()
        for answer in (await it.http.post("/requests/nobody"), await it.http.delete("/requests/nobody", params={"error": "disconnected"})):
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "request_not_found")
        for body in (b"{", b'{"tokens": -1}', b'{"output": 1}', b'[1]'):
            assert (await it.http.post("/requests/a/b%20c", content=body)).status_code == 400
        for wrong in ({"outcome": "well"}, {"cached_tokens": "many"}, {"error": "disliked"}, {"why": "x"}):
            assert (await it.http.delete("/requests/a/b%20c", params=wrong)).status_code == 400
        assert {**it.load(), "engine.backlog": 0} == {**before, "engine.backlog": 0}
        assert (await it.http.delete("/requests/a%2Fb%20c")).status_code == 204
        assert (await it.http.delete("/requests/a%2Fb%20c")).status_code == 404
        assert not it.load()


async def test_it_waits_in_the_queue_as_others_do_and_errors_are_those_of_generate():
    async with site(ONE_AT_A_TIME, workers=1) as it:
        await it.select("first")
        second = asyncio.create_task(it.select("second", [7] * 32))
        await until(lambda: it.dispatcher.waiting == 1)
        question = {"token_ids": PROMPT, "request_id": "third"}
        request = {"token_ids": PROMPT, "id": "third", "model": it.cluster.model.name}
        full = [await it.http.post("/select", json=question), await it.http.post("/generate", json=request)]
        assert [(answer.status_code, answer.json()) for answer in full] == [(529, full[0].json())] * 2
        assert full[0].headers["retry-after"] == "1"
        assert not second.done()
        await it.http.post("/requests/first")
        assert (await second)["request_id"] == "second"
        assert it.cluster.catalog.decision("second")["waited"] > 0  # type: ignore[index]
        pin = {"hints": {"instance": 1}}
        nobody = [await it.http.post("/select", json=question | pin), await it.http.post("/generate", json=request | pin)]
        assert [answer.status_code for answer in nobody] == [503, 503]
        assert nobody[0].json()["error"]["code"] == nobody[1].json()["error"]["code"] == "no_worker"
        too_long = [await it.http.post("/select", json=question | {"max_tokens": 10**7}),
                    await it.http.post("/generate", json=request | {"stops": {"max_tokens": 10**7}})]  # fmt: skip
        assert [(answer.status_code, answer.json()) for answer in too_long] == [(400, too_long[0].json())] * 2


async def test_before_there_is_a_model_a_gateway_is_told_to_come_again():
    async with Cluster.up(workers=0, router=EVERY_FACT) as cluster:
        app = router_app(RouterService(cluster.catalog, cluster.registry, silence=60))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://router") as http:
            answer = await http.post("/select", json={"token_ids": PROMPT})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")


@pytest.mark.parametrize("path", ["/select", "/generate"])
async def test_a_client_that_leaves_while_it_waits_gets_no_booking(path: str):
    async with site(ONE_AT_A_TIME, workers=1) as it, serve_status(Status("127.0.0.1", 0), router_app(it.service)) as url, httpx.AsyncClient() as http:
        await it.select("first")
        body = {"token_ids": PROMPT, "request_id": "second"} if path == "/select" else {"token_ids": PROMPT, "id": "second", "model": it.cluster.model.name}
        leaving = asyncio.create_task(http.post(url + path, json=body))
        await until(lambda: it.dispatcher.waiting == 1)
        leaving.cancel()
        await until(lambda: it.dispatcher.waiting == 0)
        it.service.release(Release(request_id="first"))
        assert not it.load()
        await until(lambda: it.service._active == set())  # pyright: ignore[reportPrivateUsage]


async def test_a_worker_that_a_gateway_complains_of_is_avoided_as_if_a_stream_had_broken():
    async with site(migration=Migration(inhibit=60.0)) as it:
        bad = (await it.select("r0"))["worker"]["label"]
        await it.http.delete("/requests/r0", params={"error": "disconnected"})
        assert it.metric("dynamo_router_reservations_ended_total", outcome="failed") == 1
        others = {(await it.select(f"r{i}"))["worker"]["label"] for i in range(1, 4)}
        assert len(others) == 1
        assert bad not in others
        it.service.release(Release(request_id="r1", error="worker_overloaded", outcome="cancelled"))
        why = {row["label"]: row["facts"]["worker.inhibited_why"] for row in it.dispatcher.router.status()}
        assert why == {bad: "a gateway reported disconnected", others.pop(): "it said that it is at capacity"}
        assert it.metric("dynamo_router_reservations_ended_total", outcome="cancelled") == 1


async def test_a_gateway_that_vanishes_is_forgotten():
    async with site(silence=0.1) as it:
        await it.select("r0")
        await it.select("r1", [70, *PROMPT])
        it.service.progress(Progress(request_id="r0", tokens=30))
        await until(lambda: not it.load())
        assert it.metric("dynamo_router_reservations_ended_total", outcome="expired") == 2
        assert it.cluster.catalog.decision("r0")["outcome"] == "cancelled"  # type: ignore[index]
        assert (await it.http.post("/requests/r0")).status_code == 404
        assert (await it.http.get("/dump")).json()["reservations"] == 0
        # And again, after a time in which there was nobody.
        await it.select("r0")
        await until(lambda: not it.load())
        assert it.metric("dynamo_router_reservations_ended_total", outcome="expired") == 3


async def test_reservations_are_bounded():
    async with site() as it:
        reservations = Reservations(CollectorRegistry(), set(), silence=60, limit=2)

        async def reserve(id: str) -> None:
            await reservations.reserve(it.dispatcher, RoutingRequest(id, it.cluster.model.name, PROMPT, len(PROMPT)), Context(id), 16)

        await reserve("r0")
        await reserve("r1")
        with pytest.raises(AllBusy, match="2 selected requests have not been released"):
            await reserve("r2")
        reservations.release(Release(request_id="r0"))
        await reserve("r2")


async def test_every_series_is_on_the_page():
    page = set(re.findall(r"^\| `(\w+)`", (Path(__file__).parents[4] / "docs" / "reference" / "metrics.md").read_text(), re.M))
    async with site() as it:
        await it.select()
        await it.http.delete("/requests/r")
        families = list(text_string_to_metric_families((await it.http.get("/metrics")).text))
    exported = {family.name + ("_total" if family.type == "counter" else "") for family in families if not family.name.endswith("_created")}
    assert {"dynamo_router_reservations", "dynamo_router_reservations_ended_total"} <= exported
    assert exported <= page


# -------------------------------------------------------------- over the request plane, and among other routers


@pytest.mark.parametrize("plane", ["tcp", "http"])
async def test_the_same_over_a_request_plane(plane: str):
    async with (
        Cluster.up(workers=1, engine="echo", router=ONE_AT_A_TIME, request_plane=Use(plane)) as cluster,
        Runtime.open(cluster.config, cluster.plugins) as runtime,
        FleetCatalog.open(runtime, registry := CollectorRegistry()) as catalog,
    ):
        await until(lambda: catalog.not_ready() is None)
        service = RouterService(catalog, registry, silence=60)
        await runtime.serve("router", endpoints := service.endpoints())
        for endpoint in endpoints:
            await runtime.announce("router", endpoint)
        address = runtime.instance("router", "select").address
        member = cluster.members[0]
        assert member is not None

        async def ask(endpoint: str, context: Context | None = None, **body: Any) -> Any:
            path = f"{cluster.config.namespace}.router.{endpoint}"
            (answer,) = await member.runtime.channels.call(address, path, msgspec.msgpack.encode(body), context or Context("q"), timeout=15.0)
            assert isinstance(answer, bytes)
            return msgspec.msgpack.decode(answer)

        def load() -> dict[str, float]:
            (rows,) = service.load().values()
            return {name: total for name in LOAD if (total := sum(row["facts"][name] for row in rows))}

        answer = await ask("select", request_id="r", token_ids=PROMPT)
        assert (answer["request_id"], answer["worker"]["label"]) == ("r", catalog.models()[0].dispatcher("aggregated").label(Worker(
            int(answer["worker"]["instance"], 16))))
        assert load()["bookings.prefill_tokens"] == 160
        with pytest.raises(IdInUse):
            await ask("select", request_id="r", token_ids=PROMPT)
        with pytest.raises(RequestNotFound):
            await ask("progress", request_id="nobody")
        with pytest.raises(RequestError, match="this is no release"):
            await ask("release", request_id="r", outcome="well")

        dispatcher, leaves = catalog.models()[0].dispatcher("aggregated"), Context("leaves")
        leaving = asyncio.create_task(ask("select", leaves, request_id="leaves", token_ids=PROMPT))
        await until(lambda: dispatcher.waiting == 1)
        leaves.cancel("left")
        with pytest.raises(Cancelled):
            await leaving
        await until(lambda: dispatcher.waiting == 0)

        assert await ask("progress", request_id="r", tokens=20) == {}
        assert load()["bookings.blocks"] == 12
        assert "bookings.prefill_tokens" not in load()
        assert await ask("release", request_id="r") == {}
        assert not load()
        with pytest.raises(RequestNotFound):
            await ask("release", request_id="r")


@pytest.mark.parametrize("event_plane", [None, Use("zmq")], ids=["in-process", "zmq"])
async def test_routers_in_sync_count_what_the_other_one_has_selected(event_plane: Use | None):
    async with site(workers=1, event_plane=event_plane) as it, Runtime.open(it.cluster.config, it.cluster.plugins) as runtime:
        async with FleetCatalog.open(runtime, CollectorRegistry()) as catalog:
            await until(lambda: catalog.not_ready() is None)

            def theirs() -> dict[str, float]:
                rows = catalog.models()[0].dispatcher("aggregated").router.status()
                return {name: total for name in LOAD if (total := sum(row["facts"][name] for row in rows)) and name != "engine.backlog"}

            expected = {"bookings.in_flight": 1, "bookings.prefill_tokens": 160, "bookings.blocks": 10, "kv.active_blocks": 10, "engine.context": 160}
            # Where every publisher has to be found first, the first words are heard late.
            await it.select()
            await until(lambda: theirs() == expected)
            it.service.progress(Progress(request_id="r", tokens=33))
            await until(lambda: theirs().get("bookings.blocks") == 13 and "bookings.prefill_tokens" not in theirs())
            it.service.release(Release(request_id="r"))
            await until(lambda: not theirs())


async def test_a_dispatched_request_and_a_selected_one_share_a_fleet():
    async with site(workers=2) as it:
        first = await it.select("r0")
        generation = await it.cluster.generate([80, *PROMPT], max_tokens=4)
        await read_all(generation)
        assert list(generation.workers) != [first["worker"]["label"]]
        it.service.release(Release(request_id="r0"))
        assert not it.load()
