"""The chart, run: a frontend, workers and the planner as the processes of pods. A load wakes a fleet of nothing, rises, and stops; meanwhile somebody else
scales, the API server is away, and a worker is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest

from dynamo_core.ending import ended
from dynamo_core.testing.servers import free_port

pytestmark = pytest.mark.slow

PLANNER = {
    "model": "sim", "tick": 0.5, "interval": 1.0, "cold_start": 3.0, "patience": 1.5, "idle": 2.0, "minimum": {"aggregated": 0}, "gpus": 3,
    "connector": {"yield_for": 2.0, "verify_timeout": 3.0, "gpus": {"aggregated": 1}},
}


@attrs.define
class Site:
    """What can be seen of the fleet from outside."""

    client: httpx.AsyncClient
    journal: Path
    logs: Path
    codes: Counter[int] = attrs.field(factory=Counter[int])

    async def workers(self) -> int:
        """That the frontend would send requests to."""
        try:
            found = (await self.client.get("/health")).json()["models"].get("sim", {}).get("workers", [])
        except httpx.TransportError:
            return 0
        return sum(worker["proven"] for worker in found)

    def decisions(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.journal.read_text().splitlines()] if self.journal.exists() else []

    async def ask(self) -> None:
        body = {"model": "sim", "prompt": "tell me more", "max_tokens": 60, "ignore_eos": True}
        self.codes[(await self.client.post("/v1/completions", json=body)).status_code] += 1

    async def ask_on(self) -> None:
        while True:
            await self.ask()

    async def answers(self, more: int) -> None:
        """Wait for so many more."""
        enough = self.codes.total() + more
        async with asyncio.timeout(60):
            while self.codes.total() < enough:
                await asyncio.sleep(0.05)

    def told(self) -> str:
        """What the processes said, for whoever looks why this failed."""
        return "\n".join(f"{file.parent.name}: {file.read_text()[-1500:]}" for file in sorted(self.logs.glob("fleet-*/log")) + sorted(self.logs.glob("chat-*/log")))


@pytest.fixture
async def site(api_server, kube, render, apply, graph, controllers, tmp_path):
    """`helm install` with `planner.graph=chat`; the pods of the graph are those of the chart's pool, which itself is empty."""
    port, journal = free_port(), tmp_path / "decisions.jsonl"
    planner = {**PLANNER, "use": "standard", "record": str(journal), "metrics": {"frontends": [f"http://127.0.0.1:{port}"]}}
    pool = {"name": "backend", "role": "aggregated", "replicas": 0, "drainSeconds": 10, "engine": {"use": "sim", "max_sequences": 4}}
    objects = render(kube.namespace, "planner.enabled=true", "planner.graph=chat", "frontend.replicas=1", "stack.frontend.hold.max_wait=60", f"planner.config={json.dumps(planner)}",
                     f"workers=[{json.dumps(pool)}]", f'env=[{{"name": "DYNAMO__FRONTEND__PORT", "value": "{port}"}}]')
    for document in objects:
        await apply(document)
    pod = next(document for document in objects if document["metadata"]["name"] == "fleet-backend")["spec"]["template"]
    await graph.of({"name": "worker", "type": "worker", "replicas": 0, "podTemplate": pod})
    await graph.adapt("worker", 0)
    controllers("scheduler", "kubelet", "sets", "operator")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client:
        yield Site(client, journal, api_server.folder)


async def test_the_planner_follows_a_load_and_no_request_fails_whatever_else_happens(site: Site, api_server, kube, graph, until) -> None:
    async def serve(count: int) -> None:
        async def so_many() -> bool:
            return await site.workers() == count and (await graph.replicas())["worker"] == count

        try:
            await until(so_many)
        except TimeoutError:
            pytest.fail(f"{count} workers do not come: {site.told()}")

    async def outage() -> None:
        api_server.kill()
        blind = await done("skipped", after=site.decisions()[-1]["number"])
        assert "the fleet: what runs is unknown" in blind["result"]
        await site.answers(30)
        assert await site.workers() == 3, "an outage is not an empty fleet"
        await asyncio.to_thread(api_server.start)
        await done("kept", after=site.decisions()[-1]["number"])

    async def kill_a_worker() -> None:
        pods, _ = await kube.listing(kube.path("v1", "pods"), labelSelector="role=worker")
        name = pods[0]["metadata"]["name"]
        os.kill(int((site.logs / f"{name}-0" / "pid").read_text()), signal.SIGKILL)

        async def again() -> bool:
            return (await kube.call("GET", kube.path("v1", "pods", name)))["status"]["containerStatuses"][0]["restartCount"] == 1

        await until(again)

    async def done(action: str, after: int = 0) -> dict[str, Any]:
        async def found() -> dict[str, Any] | None:
            return next((decision for decision in site.decisions() if decision.get("action", "kept") == action and decision["number"] > after), None)

        return await until(found)

    async def known() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return [model["id"] for model in (await site.client.get("/v1/models")).json()["data"]] == ["sim"]
        return False

    await until(known)
    assert (await site.client.get("/ready")).status_code == 200, "nothing runs, and whoever asks is served nevertheless"
    crowd = [asyncio.create_task(site.ask_on()) for _ in range(16)]
    try:
        await serve(3)
        await graph.merge(graph.adapter("worker"), {"spec": {"replicas": 1}}, manager="an-autoscaler")
        refused = await done("refused")
        assert "an-autoscaler changed aggregated from 3 to 1" in refused["result"]
        assert (await done("scaled", after=refused["number"]))["targets"] == {"aggregated": 3}, "they had their time"
        await serve(3)
        await outage()
        await kill_a_worker()
        await serve(3)
    finally:
        await ended(*crowd)
    await serve(0)
    await site.ask()
    assert site.codes.keys() == {200}, "replicas come and go, and no client notices"

    events, _ = await kube.listing(kube.path("v1", "events"))
    changes = [event["message"] for event in events if event["involvedObject"]["kind"] == "DynamoGraphDeployment"]
    assert any(change.startswith("aggregated 1 -> 3: ") for change in changes), changes
    assert sum(change.startswith("aggregated 0 -> 1: ") for change in changes) == 2, f"for the first request, and for the one after the silence: {changes}"
