"""`dynamo planner run`: the planner as a process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from dynamo_core.config import build
from dynamo_core.config.schema import Config
from dynamo_core.discovery.contract import Delete, Put
from dynamo_core.ending import ended
from dynamo_core.errors import RequestError, StoreUnavailable
from dynamo_core.plugins import Plugins
from dynamo_core.runtime import names
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.runtime.status import serve_status, status_app
from dynamo_core.runtime.worker_role import process_registry
from dynamo_core.scaling import Connector
from dynamo_planner import build as parts
from dynamo_planner.metrics import PlannerMetrics
from dynamo_planner.observe.frontends import FrontendLoad, http_client
from dynamo_planner.observe.workers import WorkerReports
from dynamo_planner.offering import Offering
from dynamo_planner.planning import Planning
from dynamo_planner.record import read_journal
from dynamo_planner.stages.load import ByLoad

log = logging.getLogger("dynamo.planner")


async def serve_planner(config: Config, plugins: Plugins, stop: asyncio.Event) -> int:
    """Decide every tick until `stop` is set. :raises ConfigError: a part cannot be built, or the connector cannot work here."""
    table = parts.settings(config, plugins)
    registry = process_registry()
    metrics = PlannerMetrics(registry)
    connector: Connector = build(table.connector, "connector", plugins)
    async with contextlib.AsyncExitStack() as exits:
        client = await exits.enter_async_context(http_client(table.metrics))
        runtime = await exits.enter_async_context(Runtime.open(config, plugins))
        planning = Planning(parts.mind(table, plugins), connector, FrontendLoad(table.metrics, table.model, client), on_decision=metrics.saw)
        if table.record is not None and table.record.exists():
            past = read_journal(table.record)
            planning.number = past[-1].number if past else 0
            log.info("going on with %d points of history", planning.mind.recall(past, time.time()))
        if any(isinstance(stage, ByLoad) for stage in planning.mind.stages.propose):
            planning.workers = await exits.enter_async_context(WorkerReports.open(runtime, table.model, time.time))
        exits.push_async_callback(connector.close)
        await connector.start()
        if config.status.enabled:
            app = status_app("planner", lambda: problems(planning), registry, lambda action, arguments: _control(planning, action, arguments))
            url = await exits.enter_async_context(serve_status(config.status, app))
            await runtime.register("status", lambda id: (names.of_status(config.namespace, "planner", id), url.encode()))
            log.info("planning; decisions at %s", url)
        offering: Offering | None = None
        if table.idle is not None:
            offering = Offering(runtime, table.model)
            exits.push_async_callback(offering.close)
        woken = asyncio.Event()
        waking = asyncio.create_task(wake(runtime, woken), name="demand")
        try:
            await _ticks(planning, offering, table.tick, stop, woken)
        finally:
            await ended(waking)
    return 0


async def wake(runtime: Runtime, woken: asyncio.Event) -> None:
    """Set `woken` when frontends begin to hold requests for a model: a cold start is long enough without a wait for the next tick."""
    while True:
        known: set[str] = set()
        with contextlib.suppress(StoreUnavailable):
            async with runtime.discovery.watch(names.demand(runtime.config.namespace)) as changes:
                async for change in changes:
                    match change:
                        case Put(key) if key not in known:  # later ones say only that there are more
                            known.add(key)
                            woken.set()
                        case Delete(key):
                            known.discard(key)
                        case _:
                            pass
        await asyncio.sleep(0.5)


async def _ticks(planning: Planning, offering: Offering | None, seconds: float, stop: asyncio.Event, woken: asyncio.Event) -> None:
    """One tick after the other, at even times; one that took too long costs the next one, not the rhythm. Demand for a cold model brings it forward."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    said = ""
    while not stop.is_set():
        if offering is not None:
            await offering.look()
        decision = await planning.tick(time.time())
        trouble = decision.result if decision.action in ("skipped", "refused", "unavailable", "failed") else ""
        if trouble != said:
            log.warning("%s: %s", decision.action, trouble) if trouble else log.info("deciding again")
        said = trouble
        for stuck in decision.stuck:
            log.log(logging.WARNING if decision.number % 30 == 0 else logging.DEBUG, "stuck: %s", stuck)
        due = max(due + seconds, loop.time())
        reasons = [asyncio.create_task(stop.wait()), asyncio.create_task(woken.wait())]
        await asyncio.wait(reasons, timeout=due - loop.time(), return_when=asyncio.FIRST_COMPLETED)
        await ended(*reasons)
        if woken.is_set():
            woken.clear()
            due = loop.time()


def problems(planning: Planning) -> dict[str, str]:
    """For `/health`: what was missing or refused at the last decision, and what is stuck."""
    last = planning.ring.find()
    if last is None:
        return {"planner": "no decision was made yet"}
    found = {f"stuck {i}": what for i, what in enumerate(last.stuck, 1)}
    if last.action in ("skipped", "refused", "unavailable", "failed"):
        found["decision"] = f"{last.action}: {last.result}"
    return found


async def _control(planning: Planning, action: str | None, arguments: Mapping[str, Any]) -> Any:
    if action is None:
        return {"actions": ["decisions", "explain"]}
    if action == "decisions":
        last = arguments.get("last", 50)
        if not isinstance(last, int) or last < 1:
            raise RequestError("`last` must be a whole number above 0", param="last")
        return [msgspec.to_builtins(decision) for decision in list(planning.ring)[-last:]]
    if action == "explain":
        number = arguments.get("number")
        if (decision := planning.ring.find(number)) is None:
            raise RequestError(f"decision {number} is not kept; the last {len(planning.ring)} are", param="number")
        return msgspec.to_builtins(decision)
    raise RequestError(f"the planner has no action {action!r}; it has decisions and explain")

