"""`dynamo planner global`: keeps the ledger, and answers planners that prove who they are."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import Mapping
from typing import Any

import attrs
import msgspec
from attrs import validators as v
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dynamo_core.config import Tls
from dynamo_core.errors import ConfigError, Problem
from dynamo_core.plugins import Plugins
from dynamo_core.runtime.worker_role import process_registry
from dynamo_planner.sharing.ledger import Ledger, Member
from dynamo_planner.sharing.wire import PATH, Answer, Ask

log = logging.getLogger("dynamo.planner.global")

LARGEST = 16 * 1024
"""Bytes of a question."""
SHORTEST_TOKEN = 16


def _tokens(_: object, __: object, members: Mapping[str, Member]) -> None:
    tokens = [member.token for member in members.values()]
    if any(len(token) < SHORTEST_TOKEN for token in tokens):
        raise ValueError(f"a token has at least {SHORTEST_TOKEN} characters")
    if len({*tokens}) < len(tokens):
        raise ValueError("two planners have the same token, so one could spend what the other was granted")


@attrs.frozen
class GlobalPlanner:
    """`[planner] use = "global"`: one GPU budget over several planners."""

    gpus: int = attrs.field(validator=v.ge(0))
    """The budget."""
    planners: Mapping[str, Member] = attrs.field(validator=[v.min_len(1), _tokens])
    """Who may ask, by name."""
    host: str = "127.0.0.1"
    """The address to listen on."""
    port: int = attrs.field(default=9086, validator=[v.ge(0), v.le(65535)])
    """0 takes any free port, and logs it."""
    tls: Tls | None = None
    """Serve HTTPS: beyond this machine, tokens should not travel in the clear."""
    lease: float = attrs.field(default=30.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds after its last call after which a planner counts as gone, and its GPUs as free."""
    patience: float = attrs.field(default=60.0, validator=v.ge(0), metadata={"duration": True})
    """Seconds for which a parked wish is overtaken by smaller ones; then it goes first, and others go down to their share for it."""

    def __attrs_post_init__(self) -> None:
        if (kept := sum(member.minimum for member in self.planners.values())) > self.gpus:
            raise ValueError(f"the minimums are {kept} GPUs together, and the budget is {self.gpus}")


class Site:
    """The HTTP surface of a ledger."""

    def __init__(self, settings: GlobalPlanner, registry: CollectorRegistry) -> None:
        self._settings = settings
        self.ledger = Ledger(settings.gpus, settings.planners, settings.lease, settings.patience, started=time.monotonic())
        self._registry = registry
        self._gpus = Gauge("dynamo_global_planner_gpus", "GPUs of each planner: granted, in_use, parked.", ["planner", "state"], registry=registry)
        self._free = Gauge("dynamo_global_planner_free_gpus", "GPUs of the budget that nobody has and that are kept for nobody.", registry=registry)
        Gauge("dynamo_global_planner_budget_gpus", "The budget.", registry=registry).set(settings.gpus)
        self._asked = Counter("dynamo_global_planner_calls", "Calls, by what came of them.", ["planner", "outcome"], registry=registry)
        self._said: dict[str, str] = {}

    def app(self) -> Starlette:
        return Starlette(routes=[Route(PATH, self.ask, methods=["POST"]), Route("/v1/budget", self.budget), Route("/health", self.health),
                                 Route("/metrics", self.metrics)])

    async def ask(self, request: Request) -> Response:
        name = self._caller(request)
        if name is None:
            self._asked.labels("unknown", "unauthorized").inc()
            return _refused(401, "the token is that of no planner")
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LARGEST:
                return _refused(413, f"a question has at most {LARGEST} bytes")
        try:
            ask = msgspec.json.decode(body, type=Ask)
        except msgspec.MsgspecError as e:
            return _refused(400, f"the question is not understood: {e}")
        if min(ask.wanted, ask.in_use) < 0:
            return _refused(400, "counts of GPUs are not negative")
        self.look()
        grant = self.ledger.ask(name, ask.wanted, ask.in_use, time.monotonic())
        self._asked.labels(name, "parked" if grant.parked is not None else "granted").inc()
        self._tell(name, f"{grant.granted} GPUs" + (f", and {grant.parked} parked" if grant.parked is not None else ""), ask.reason)
        return _json(Answer(planner=name, lease=self.ledger.lease, **attrs.asdict(grant)))

    async def budget(self, request: Request) -> Response:
        """Who has what, for planners and their people."""
        if self._caller(request) is None:
            return _refused(401, "the token is that of no planner")
        self.look()
        holdings = {name: dict(zip(("granted", "in_use", "parked"), counts, strict=True)) for name, counts in self.ledger.holdings().items()}
        return _json({"gpus": self.ledger.gpus, "free": self.ledger.free(), "planners": holdings, "shares": self.ledger.shares()})

    async def health(self, request: Request) -> Response:
        return _json({"status": "ready", "role": "global planner", "planners": len(self.ledger.holdings())})

    async def metrics(self, request: Request) -> Response:
        self.look()
        self._gpus.clear()
        for name, counts in self.ledger.holdings().items():
            for state, count in zip(("granted", "in_use", "parked"), counts, strict=True):
                self._gpus.labels(name, state).set(count)
        self._free.set(self.ledger.free())
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    def look(self) -> None:
        """Time passes for those who do not call."""
        now = time.monotonic()
        for name in self.ledger.expire(now):
            self._said.pop(name, None)
            log.warning("%s has not called for %g s, and has nothing any more", name, self.ledger.lease)
        self.ledger.settle(now)

    def _caller(self, request: Request) -> str | None:
        given = request.headers.get("authorization", "").encode("utf-8", "replace")
        found = None
        for name, member in self._settings.planners.items():  # all of them: the time that it takes must not tell which one was close
            if hmac.compare_digest(given, b"Bearer " + member.token.encode()):
                found = name
        return found

    def _tell(self, name: str, has: str, reason: str) -> None:
        if self._said.get(name) != has:
            self._said[name] = has
            log.info("%s: %s%s", name, has, f" ({reason[:200]!r})" if reason else "")


async def serve_global(settings: GlobalPlanner, plugins: Plugins, stop: asyncio.Event) -> int:
    """Answer until `stop` is set. Nothing is kept: planners say again what they have. :raises ConfigError: the address is taken."""
    site = Site(settings, process_registry())
    server: Any = plugins.find("http_server", "hypercorn").load()()
    if settings.host not in ("127.0.0.1", "localhost", "::1") and settings.tls is None:
        log.warning("listening beyond this machine (%s) without TLS: whoever sees the tokens can spend the budget", settings.host)
    looking = asyncio.create_task(_look(site, settings.lease / 4), name="leases")
    listening = False

    def said(port: int) -> None:
        nonlocal listening
        listening = True
        log.info("listening on %s://%s:%d", "https" if settings.tls else "http", settings.host, port)

    try:
        await server.serve(site.app(), host=settings.host, port=settings.port, tls=settings.tls, stop=stop, reuse_port=False, on_listening=said,
                           drain_timeout=2.0)
    except OSError as e:
        if listening:
            raise
        raise ConfigError(Problem(str(e), remedy="choose another planner.host or planner.port")) from e
    finally:
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking
    return 0


async def _look(site: Site, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        site.look()


def _json(body: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def _refused(status: int, why: str) -> Response:
    return _json({"error": {"message": why}}, status)
