"""What operators, load balancers and model pickers ask."""

from __future__ import annotations

from fake_catalog import FakeModel
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from dynamo_core.config.schema import Frontend


async def test_a_healthy_frontend_says_so_with_details(each):
    health = (await each.client.get("/health")).json()
    assert (health["status"], health["problems"], health["requests_in_progress"]) == ("healthy", {}, 0)
    assert "m" in health["models"]
    assert (await each.client.get("/ready")).status_code == 200
    assert (await each.client.get("/live")).json() == {"status": "live"}


async def test_a_known_problem_is_degraded_and_still_served(site):
    site.catalog.problems["events"] = "no KV events for 12 s"
    response = await site.client.get("/health")
    assert (response.status_code, response.json()["status"]) == (200, "degraded")
    assert response.json()["problems"] == {"events": "no KV events for 12 s"}


async def test_without_a_ready_model_the_reason_is_told_and_liveness_is_not_touched(site):
    site.model.missing = "no prefill worker"
    assert (await site.client.get("/live")).status_code == 200
    for path in ("/health", "/ready"):
        response = await site.client.get(path)
        assert (response.status_code, response.json()["status"]) == (503, "unready")
        assert "no model is ready" in response.text


async def test_a_draining_frontend_is_alive_but_not_ready_and_serves_on(site):
    site.app.drain()
    assert (await site.client.get("/live")).status_code == 200
    for path in ("/health", "/ready"):
        response = await site.client.get(path)
        assert (response.status_code, response.json()["status"]) == (503, "draining")
    assert (await site.chat()).status_code == 200


async def test_only_ready_models_are_listed_and_their_birthday_does_not_move(site):
    first = (await site.client.get("/v1/models")).json()
    assert [entry["id"] for entry in first["data"]] == ["m", "org/name/with-slashes"]
    assert (await site.client.get("/v1/models")).json() == first
    assert first["data"][0]["max_model_len"] == 1000
    site.model.missing = "anything"
    assert (await site.client.get("/v1/models")).json()["data"] == []
    response = await site.client.get("/v1/models/m")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")


async def test_an_alias_that_is_a_models_own_name_is_listed_once(site):
    other = FakeModel("org/name/with-slashes")
    site.catalog.every.append(other)
    listed = (await site.client.get("/v1/models")).json()["data"]
    assert [(entry["id"], entry["root"]) for entry in listed] == [("m", "m"), ("org/name/with-slashes", "org/name/with-slashes")]


async def test_model_ids_may_contain_slashes(each):
    response = await each.client.get("/v1/models/org/name/with-slashes")
    assert (response.json()["id"], response.json()["root"]) == ("org/name/with-slashes", "m")
    assert (await each.client.get("/v1/models/org/other")).status_code == 404
    assert (await each.chat(model="org/name/with-slashes")).json()["model"] == "org/name/with-slashes"
    assert each.model.starts[0][0].model == "m"


async def test_decisions_and_the_fleet_can_be_looked_at(site):
    site.catalog.records["d1"] = {"chosen": "w1"}
    assert (await site.client.get("/debug/decisions/d1")).json() == {"chosen": "w1"}
    assert (await site.client.get("/debug/decisions/d2")).status_code == 404
    assert "models" in (await site.client.get("/debug/fleet")).json()


async def test_debug_routes_can_be_turned_off(start):
    async with start(config=Frontend(debug_routes=False)) as site:
        assert (await site.client.get("/debug/fleet")).status_code == 404


async def test_the_specification_names_every_field_and_route(site):
    specification = (await site.client.get("/openapi.json")).json()
    assert "continue_final_message" in specification["components"]["schemas"]["ChatBody"]["properties"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"} <= set(specification["paths"])
    assert "/v1/chat/completions" in (await site.client.get("/docs")).text


class Shout:
    def __init__(self, app, word):
        self.app, self.word = app, word

    async def __call__(self, scope, receive, send):
        async def sending(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-shout", self.word)]
            await send(message)

        await self.app(scope, receive, sending)


async def test_routes_and_middleware_can_be_added(run):
    async def hello(request):
        return PlainTextResponse("hello")

    async with run(extra_routes=[Route("/hello", hello)], middleware=[Middleware(Shout, word=b"hey")], model=FakeModel("m")) as site:
        response = await site.client.get("/hello")
        assert (response.text, response.headers["x-shout"]) == ("hello", "hey")
        assert response.headers["x-request-id"]
        assert (await site.chat()).headers["x-shout"] == "hey"


async def test_a_route_that_breaks_is_a_500_in_openais_shape(run):
    async def broken(request):
        raise RuntimeError("a detail")

    async with run(extra_routes=[Route("/broken", broken)]) as site:
        response = await site.client.get("/broken")
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
        assert "a detail" not in response.text
