"""A whole stack on this machine: every role of one file as a child process, and what it takes to know that it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from dynamo_core.cli.supervisor import CONFIGURATION, Child, Supervisor
from dynamo_core.config import build
from dynamo_core.config.schema import Config
from dynamo_core.discovery.contract import Discovery
from dynamo_core.errors import ConfigError, DynamoError, Problem, Unavailable
from dynamo_core.frontend.servers.sockets import reserved_port
from dynamo_core.frontend.siblings import meeting_place
from dynamo_core.httpx_client import HttpClient
from dynamo_core.plugins import Plugins
from dynamo_core.runtime.inside import copies

POLL = 0.1
_FRONTEND, _WORKER = 0, 1
"""Ranks of children: who is stopped first."""

Health = dict[str, Any]
"""What a worker's status endpoint says."""


class LocalStack:
    """Use `LocalStack.open`; entered, every role was started, and `wait_ready` says when it serves."""

    def __init__(self, config: Config, discovery: Discovery, supervisor: Supervisor) -> None:
        self.config = config
        self.supervisor = supervisor
        self._discovery = discovery
        self._ready: set[int] = set()
        """Process ids of frontends that have every worker."""
        self._headless = 0
        """Ready workers of this stack, in the frontend's namespace, that offer no model: parts of an engine with its head elsewhere, which no frontend sees."""

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, path: Path | None, overrides: Sequence[str], config: Config, plugins: Plugins,
                   say: Callable[[str, str], None]) -> AsyncGenerator[LocalStack]:
        """:param say: receives (child name, line) for everything that the children print."""
        if config.discovery.name == "memory" or config.request_plane.name == "in-process":
            whole = config.workers and all(worker.inside for worker in config.workers)
            remedy = "all workers are inside: `dynamo frontend` is the whole stack" if whole else 'use discovery = "file" and request_plane = "tcp"'
            raise ConfigError(Problem("`dynamo up` starts a process for each role, and they cannot meet through memory", config.discovery.where, remedy=remedy))
        settings = config.frontend
        if settings.tls and settings.tls.client_ca and settings.admin is None:
            raise ConfigError(Problem("`dynamo up` cannot ask a frontend that wants client certificates whether it is ready", "frontend.tls.client_ca",
                                      remedy="add [frontend.admin]: an address of its own for health, metrics and debug"))
        drains = {inside: max([worker.drain_timeout for *_, worker in copies(config, inside=inside)], default=0.0) for inside in (True, False)}
        grace = max(config.frontend.drain_timeout + 2 * drains[True], drains[False])  # a frontend drains first, then the workers inside
        supervisor = Supervisor(say, grace=grace)
        shared = [*([str(path)] if path else []), *(f"--set={override}" for override in overrides)]
        discovery: Discovery = build(config.discovery, "discovery", plugins)
        frontend = ["frontend", *shared, "--single"]
        async with contextlib.AsyncExitStack() as held:
            await held.enter_async_context(discovery)
            if settings.processes > 1 and not settings.port:
                frontend.append(f"--port={held.enter_context(reserved_port(settings.host))}")
            names = ["frontend"] if settings.processes == 1 else [f"frontend-{copy}" for copy in range(settings.processes)]
            environments = held.enter_context(meeting_place(names))
            stack = cls(config, discovery, supervisor)
            try:
                for name, index, _ in copies(config, inside=False):
                    supervisor.start(Child(name, ["worker", *shared, f"--index={index}"], rank=_WORKER))
                for name, environment in zip(names, environments, strict=True):
                    supervisor.start(Child(name, frontend, rank=_FRONTEND, environment=environment))
                yield stack
            finally:
                await supervisor.stop()

    @property
    def wanted(self) -> int:
        """Workers that the frontend of the file must see."""
        return sum(worker.count for worker in self.config.workers if worker.namespace in (None, self.config.namespace)) - self._headless

    async def status_urls(self, role: str, namespace: str | None = None) -> list[str]:
        """Status endpoints of the processes of a role, from discovery."""
        return sorted((await self._registered(role, namespace or self.config.namespace)).values())

    async def _registered(self, role: str, namespace: str) -> dict[str, str]:
        """The same by the lease of the process."""
        with contextlib.suppress(DynamoError):
            return {key.rpartition("/")[2]: value.decode() for key, value in (await self._discovery.items(f"v1/status/{namespace}/{role}/")).items()}
        return {}

    async def _missing_elsewhere(self, healths: Sequence[tuple[str, Health]]) -> int:
        """Workers in other namespaces than the frontend's, which are not registered yet: they register when they are ready."""
        missing = 0
        for namespace, name in {(w.namespace, w.name) for w in self.config.workers if w.namespace not in (None, self.config.namespace)}:
            wanted = sum(w.count for w in self.config.workers if (w.namespace, w.name) == (namespace, name))
            wanted -= sum(_headless(health) for where, health in healths if (where, health.get("role")) == (namespace, name))
            with contextlib.suppress(DynamoError):
                missing += max(0, wanted - len(await self._discovery.items(f"v1/instances/{namespace}/{name}/generate/")))
        return missing

    async def wait_ready(self, progress: Callable[[str], None], timeout: float) -> str:
        """Return the frontend's URL once every worker of the file serves. `progress` gets one sentence at each change.

        :raises ConfigError: a child ended because of its configuration. :raises Unavailable: one ended for good, or not ready within `timeout` seconds.
        """
        started, said = time.monotonic(), ""
        async with HttpClient(timeout=5.0, verify=False, headers={"connection": "close"}) as client:
            while True:
                if (lost := self.supervisor.lost) is not None:
                    what = f"{lost.name} ended with exit code {lost.exit_code}; its last lines say why"
                    raise ConfigError(Problem(what)) if lost.exit_code == CONFIGURATION else Unavailable(what)
                url, sentence = await self._look(client)
                if url:
                    return url
                if sentence != said:
                    progress(sentence)
                    said = sentence
                if time.monotonic() - started > timeout:
                    raise Unavailable(f"the stack is not ready after {timeout:g} s: {sentence}")
                await asyncio.sleep(POLL)

    async def _look(self, client: httpx.AsyncClient) -> tuple[str, str]:
        """The URL once everything is ready, else what is missing."""
        processes, namespace = self.config.frontend.processes, self.config.namespace
        public = await self._registered("frontend", namespace)
        if not public:
            return "", f"starting the frontend{'s' if processes > 1 else ''}"
        healths = await self._healths(client)
        self._headless = sum(_headless(health) for where, health in healths if where == namespace)
        if missing := await self._missing_elsewhere(healths):
            return "", f"{missing} workers of other namespaces are not ready"
        url, proven = "", 0
        own = self._own(_FRONTEND)
        inside = {name for name, *_ in copies(self.config, inside=True)}
        phases = [phase for _, health in healths if (phase := health.get("problems", {}).get("starting"))]
        # Processes that share one address answer in no order: each question is a connection of its own, until every one of them has said it.
        for lease, asked in (await self._registered("frontend-admin", namespace) or public).items():
            try:
                answer: dict[str, Any] = (await client.get(f"{asked}/health")).json()
            except (httpx.HTTPError, ValueError):
                continue
            if answer.get("pid") not in own or lease not in public:  # a fleet may have frontends that others have started
                continue
            url = public[lease]
            problems: dict[str, str] = answer.get("problems", {})
            phases += [problem for name, problem in problems.items() if name.partition(" ")[0] in inside]
            models: dict[str, Any] = answer.get("models", {})
            workers = [worker for model in models.values() for worker in model.get("workers", ())]
            proven = sum(bool(worker.get("proven")) for worker in workers)
            if proven >= self.wanted:
                self._ready.add(answer["pid"])
        if not url:
            return "", "the frontend does not answer yet"
        if len(self._ready) >= processes:
            return url, "ready"
        if proven >= self.wanted:
            return "", f"{len(self._ready)} of {processes} frontends ready"
        return "", f"{proven} of {self.wanted} workers ready" + (f" ({', '.join(dict.fromkeys(phases))})" if phases else "")

    async def _healths(self, client: httpx.AsyncClient) -> list[tuple[str, Health]]:
        """Namespace, and what the worker says of itself, for each of this stack that answers. Others may have workers of the same names in the fleet."""
        found: list[tuple[str, Health]] = []
        own = self._own(_WORKER)
        for name, namespace in sorted({(worker.name, worker.namespace or self.config.namespace) for worker in self.config.workers}):
            for url in await self.status_urls(name, namespace):
                with contextlib.suppress(httpx.HTTPError, ValueError):
                    health: Health = (await client.get(f"{url}/health")).json()
                    if health.get("pid") in own:
                        found.append((namespace, health))
        return found

    def _own(self, rank: int) -> set[int]:
        """Processes of this stack."""
        return {child.process.pid for child in self.supervisor.children if child.rank == rank and child.process is not None}


def _headless(health: Health) -> bool:
    return health.get("status") != "unready" and health.get("models") == []
