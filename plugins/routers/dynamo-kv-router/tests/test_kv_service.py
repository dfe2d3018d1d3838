"""The router that stands by itself, over a request plane and over HTTP."""

from __future__ import annotations

import asyncio

import httpx
import msgspec
import pytest
from prometheus_client import CollectorRegistry

from dynamo_core.config.schema import Router, Use
from dynamo_core.context import Context
from dynamo_core.errors import RequestError
from dynamo_core.pipeline.catalog import FleetCatalog
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.testing.cluster import Cluster
from dynamo_core.types import Hints, Output, Request, Stops
from dynamo_kv_router.service import Question, RouterService
from dynamo_kv_router.store import kind_of
from dynamo_kv_router.web import router_app


async def until(condition) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("plane", ["tcp", "http"])
async def test_questions_and_streams_over_a_request_plane(plane):
    async with (
        Cluster.up(workers=2, engine="echo", router=Router(use=Use("kv")), request_plane=Use(plane)) as cluster,
        Runtime.open(cluster.config, cluster.plugins) as runtime,
        FleetCatalog.open(runtime, registry := CollectorRegistry()) as catalog,
    ):
        await until(lambda: catalog.not_ready() is None)
        service = RouterService(catalog, registry, silence=60)
        endpoints = service.endpoints()
        await runtime.serve("router", endpoints)
        for endpoint in endpoints:
            await runtime.announce("router", endpoint)
        address = runtime.instance("router", "load").address
        channels = cluster.members[0].runtime.channels  # type: ignore[union-attr]

        async def ask(endpoint: str, body: object) -> object:
            items = await channels.call(address, f"{cluster.config.namespace}.router.{endpoint}", msgspec.msgpack.encode(body), Context("q"), timeout=10.0)
            return msgspec.msgpack.decode(items[0])

        prompt = list(range(65, 65 + 64))
        request = Request(id="r1", model=catalog.models()[0].name, token_ids=prompt, stops=Stops(max_tokens=5))
        stream = (await channels.get(address)).open(f"{cluster.config.namespace}.router.generate", msgspec.msgpack.encode(request), Context("r1"))
        tokens = []
        while items := await stream.read():
            tokens += [t for item in items if isinstance(item, Output) for t in item.token_ids]
        assert len(tokens) == 5
        best = await ask("best_worker", {"token_ids": prompt})
        assert best["overlap_tokens"] > 0
        scores = await ask("overlap_scores", {"token_ids": prompt})
        held = {w["instance"]: w["device"] for w in scores["workers"]}
        assert held[best["worker"]["instance"]] == max(held.values()) > 0 == min(held.values())
        assert len(next(iter((await ask("load", {})).values()))) == 2
        dump = await ask("dump", {})
        assert dump["waiting"]
        (index,) = dump["indexes"].values()
        assert index["store"] == kind_of("auto").name
        assert index["blocks"] >= best["overlap_tokens"] // 16 > 0 == index["forgotten"]
        with pytest.raises(RequestError, match="this is no question"):
            await ask("best_worker", {"tokens": 1})
        assert not cluster.catalog.problems()


async def test_the_same_over_http():
    async with Cluster.up(workers=2, engine="echo", router=Router(use=Use("kv-plus"))) as cluster:
        app = router_app(RouterService(cluster.catalog, cluster.registry, silence=60))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://router") as client:
            body = {"id": "r1", "model": cluster.model.name, "token_ids": list(range(65, 129)), "stops": {"max_tokens": 4}}
            lines = [msgspec.json.decode(line) for line in (await client.post("/generate", json=body)).text.splitlines()]
            assert sum(len(line["token_ids"]) for line in lines) == 4
            best = (await client.post("/best_worker", json={"token_ids": body["token_ids"]})).json()
            assert best["worker"]["label"].startswith("backend-")
            assert (await client.get("/health")).json()["ready"]
            assert (await client.post("/best_worker", json={"token_ids": [1], "model": "nobody"})).status_code == 404
            assert (await client.post("/best_worker", content=b"{")).status_code == 400
            assert (await client.post("/generate", content=b"{}")).status_code == 400
            assert len(next(iter((await client.get("/load")).json().values()))) == 2


async def test_names_that_mean_nothing_are_refused_and_so_is_a_prompt_that_does_not_fit():
    async with Cluster.up(workers=1, engine="echo", router=Router(use=Use("kv"))) as cluster:
        app = router_app(RouterService(cluster.catalog, cluster.registry, silence=60))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://router") as client:
            body = {"id": "r1", "model": cluster.model.name, "token_ids": list(range(65, 129))}
            for wrong, said in (({"stop": {}}, "`stop`"), ({"stops": {"max_token": 4}}, "`stops.max_token`"), ({"stops": {"max_tokens": 10**7}}, "context")):
                answer = await client.post("/generate", json={**body, **wrong})
                assert answer.status_code == 400
                assert said in answer.json()["error"]["message"]
            for path in ("/best_worker", "/overlap_scores", "/select"):
                for wrong, said in (({"hint": {}}, "`hint`"), ({"hints": {"sesion": "s"}}, "`hints.sesion`"), ({"id": "r"}, "`id`")):
                    answer = await client.post(path, json={"token_ids": [65], **wrong})
                    assert answer.status_code == 400
                    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b'{"token_ids": [1], "model": "\xff"}', b'{"token_ids": [1], "hints": {"a": ' + b"[" * 100_000, b"[" * 100_000, b"", b"null"])
async def test_bodies_that_nobody_can_read_are_the_caller_s_fault(body):
    async with Cluster.up(workers=1, engine="echo", router=Router(use=Use("kv"))) as cluster:
        app = router_app(RouterService(cluster.catalog, cluster.registry, silence=60))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app, raise_app_exceptions=False), base_url="http://router") as client:
            for path in ("/best_worker", "/generate", "/select"):
                assert (await client.post(path, content=body)).status_code == 400


async def test_a_body_that_is_too_large_is_refused_before_it_is_all_there(monkeypatch):
    monkeypatch.setattr("dynamo_kv_router.web.LIMIT", 1000)
    async with Cluster.up(workers=1, engine="echo", router=Router(use=Use("kv"))) as cluster:
        app = router_app(RouterService(cluster.catalog, cluster.registry, silence=60))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://router") as client:
            assert (await client.post("/best_worker", json={"token_ids": [65] * 1000})).status_code == 413


async def test_tokens_that_no_vocabulary_has_are_the_caller_s_fault_and_nobody_else_s():
    async with Cluster.up(workers=1, engine="echo", router=Router(use=Use("kv"))) as cluster:
        service = RouterService(cluster.catalog, cluster.registry, silence=60)
        for ask in (service.best_worker, service.overlap_scores):
            with pytest.raises(RequestError, match="token id -1 is negative"):
                ask(Question(token_ids=[-1] * 64))
        assert not cluster.model.dispatcher("aggregated").router.faults


async def test_its_decisions_can_be_explained_and_its_metrics_be_scraped():
    async with Cluster.up(workers=2, engine="echo", router=Router(use=Use("kv-plus"))) as cluster:
        app = router_app(RouterService(cluster.catalog, cluster.registry, silence=60))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://router") as client:
            best = (await client.post("/best_worker", json={"token_ids": list(range(65, 129))})).json()
            record = (await client.get(f"/debug/decisions/{best['decision']}")).json()
            assert "(dry run)" in record["text"]
            assert record["worker"][0] == int(best["worker"]["instance"], 16)
            assert (await client.get("/debug/decisions/none")).status_code == 404
            assert 'dynamo_router_decision_seconds_count{model="' in (await client.get("/metrics")).text


async def test_two_requests_of_one_id_are_booked_apart():
    async with Cluster.up(workers=1, engine="echo", router=Router(use=Use("kv"))) as cluster:
        service = RouterService(cluster.catalog, cluster.registry, silence=60)
        request = Request(id="same", model=cluster.model.name, token_ids=list(range(65, 129)), stops=Stops(max_tokens=20))
        streams = [service.generate(request, Context("same")) for _ in range(2)]
        for stream in streams:
            await anext(stream)
        booked = {request.id for request, *_ in cluster.model.dispatcher("aggregated").router.open_here()}
        assert len(booked) == 2
        for stream in streams:
            await stream.aclose()


async def test_in_a_fleet_of_prefill_and_decode_workers_it_answers_for_those_that_read_prompts():
    async with Cluster.up(workers=0, router=Router(use=Use("kv"))) as cluster:
        for role in ("prefill", "decode"):
            await cluster.add(engine=Use("sim", {"role": role, "speedup": 0}))
        await cluster.wait_ready(2)
        await until(lambda: cluster.catalog.not_ready() is None)
        service = RouterService(cluster.catalog, cluster.registry, silence=60)
        prompt = [5 + i % 190 for i in range(200)]
        roles = {f"{m.instance.id:016x}": m.card.role for m in cluster.model.members.values()}
        assert roles[service.best_worker(Question(token_ids=prompt))["worker"]["instance"]] == "prefill"
        assert roles[service.best_worker(Question(token_ids=prompt, role="decode"))["worker"]["instance"]] == "decode"
        request = Request(id="r", model=cluster.model.name, token_ids=prompt, stops=Stops(max_tokens=5))
        tokens = [token async for outputs in service.generate(request, Context("r")) for output in outputs for token in output.token_ids]
        assert len(tokens) == 5


@pytest.mark.parametrize("item", [
    {"digest": "d", "start": 0, "length": 10**12}, {"digest": "d", "start": 10**12, "length": 1}, {"digest": "d", "start": -10**12, "length": 1},
    {"digest": "d", "start": 0, "runs": [5, 10**12]}, {"digest": "d", "start": "a"}, {"digest": "d", "start": 0, "runs": 7}, {"digest": "d", "start": 0, "runs": [5]},
])
async def test_an_image_that_is_nowhere_in_the_prompt_is_refused_before_anybody_lays_it_out(item):
    async with Cluster.up(workers=1, engine="echo", router=Router(use=Use("kv"))) as cluster:
        service = RouterService(cluster.catalog, cluster.registry, silence=60)
        request = Request(id="r", model=cluster.model.name, token_ids=[65] * 40, stops=Stops(max_tokens=1), media=[item])
        with pytest.raises(RequestError, match="image"):
            await anext(service.generate(request, Context("r")))


async def test_a_number_that_cannot_be_sent_is_the_caller_s_fault_and_books_nothing():
    async with Cluster.up(workers=1, engine="echo", router=Router(use=Use("kv-plus"))) as cluster:
        service = RouterService(cluster.catalog, cluster.registry, silence=60)
        request = Request(id="r", model=cluster.model.name, token_ids=[65] * 40, stops=Stops(max_tokens=1), hints=Hints(priority=10**400))
        with pytest.raises(RequestError, match="too large to be sent"):
            await anext(service.generate(request, Context("r")))
        assert not cluster.model.dispatcher("aggregated").router.open_here()
