"""The routers of a frontend and the stacks that they decide by: made for each model and role, and changed all at once by a reload."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable

import attrs

from dynamo_core.cards import Role
from dynamo_core.config.schema import Config
from dynamo_core.config.schema import Router as RouterConfig
from dynamo_core.pipeline.metrics import PipelineMetrics
from dynamo_core.pipeline.observers import Watcher
from dynamo_core.plugins import Plugins
from dynamo_core.routing.contract import Dice
from dynamo_core.routing.decide import Stack
from dynamo_core.routing.recorder import Recorder
from dynamo_core.routing.ring import Ring
from dynamo_core.routing.router import Router
from dynamo_core.routing.shadow import Shadow
from dynamo_core.routing.stack import build_stack

log = logging.getLogger(__name__)

FIXED = ("seed", "decisions", "sync", "record", "record_bytes")
"""Settings of [router] that a running frontend cannot change."""
ROLES: tuple[Role, ...] = ("aggregated", "prefill", "decode", "encode")


@attrs.frozen
class Reload:
    """What a reload did."""

    generation: int
    """Counts the configurations that were used, from 1."""
    changed: bool
    needs_restart: tuple[str, ...] = ()
    """Settings that differ from those in use and stay as they were."""


class Stacks:
    """One for each frontend."""

    def __init__(self, config: RouterConfig, plugins: Plugins, ring: Ring, *, alone: bool = True) -> None:
        """:param alone: no other process has this configuration, its record file and its seed. :raises ConfigError: some role's stack cannot start."""
        self.config = config
        # Processes that draw alike would all break their ties for the same worker.
        if config.seed is None:
            self._seed = secrets.randbits(31)
        else:
            self._seed = config.seed if alone else Dice(config.seed << 32 ^ os.getpid()).below(2**31)
        self.generation = 1
        self._plugins = plugins
        self._ring = ring
        self._routers: list[tuple[Router, Watcher, Callable[[Router], None]]] = []
        self._build(config)
        self.recorder = None
        if (path := config.record) is not None:
            self.recorder = Recorder(path if alone else path.with_stem(f"{path.stem}-{os.getpid()}"), max_bytes=config.record_bytes)

    def router(self, model: str, role: Role, metrics: PipelineMetrics, follow: Callable[[Router], None]) -> Router:
        """A router of its own for this model and role. :param follow: called with it now, and after every reload."""
        watcher = Watcher(metrics, self._plugins, self.recorder)
        stack = build_stack(self.config, self._plugins, role=role)
        router = Router(model, stack, role=role, seed=self._seed, ring=self._ring, observer=watcher)
        router.generation = self.generation
        watcher.shadow_by(self._shadow(stack, self.config))
        self._routers.append((router, watcher, follow))
        follow(router)
        return router

    def reload(self, config: Config, running: Config) -> Reload:
        """Decide by the [router] of `config` from now on, everywhere at once, or not at all. Bookings, index and learned prices stay.

        :raises ConfigError: it cannot be used; everything stays as it is.
        """
        wanted = config.router
        fixed = tuple(f"router.{name}" for name in FIXED if getattr(wanted, name) != getattr(self.config, name))
        others = tuple(a.name for a in attrs.fields(Config) if a.name != "router" and getattr(config, a.name) != getattr(running, a.name))
        wanted = attrs.evolve(wanted, **{name: getattr(self.config, name) for name in FIXED})
        self._build(wanted)
        if wanted == self.config:
            return Reload(self.generation, False, fixed + others)
        stacks = [build_stack(wanted, self._plugins, role=router.role) for router, _, _ in self._routers]
        self.config, self.generation = wanted, self.generation + 1
        for (router, watcher, follow), stack in zip(self._routers, stacks, strict=True):
            router.swap(stack)
            router.generation = self.generation
            watcher.shadow_by(self._shadow(stack, wanted))
            follow(router)
        return Reload(self.generation, True, fixed + others)

    def status(self) -> dict[str, object]:
        """For `/debug/fleet`."""
        return {
            "generation": self.generation,
            "shadows": {f"{r.model}/{r.role}": w.shadow.status() for r, w, _ in self._routers if w.shadow is not None},
            "recording": None if self.recorder is None else {"path": str(self.recorder.path), "dropped": self.recorder.dropped},
        }

    def problems(self) -> dict[str, str]:
        found = {f"shadow stack of {r.model}/{r.role}": w.shadow.stopped for r, w, _ in self._routers if w.shadow is not None and w.shadow.stopped}
        if self.recorder is not None and (problem := self.recorder.problem()):
            found["decision records"] = problem
        return found

    def close(self) -> None:
        for _, watcher, _ in self._routers:
            watcher.shadow_by(None)
        if self.recorder is not None:
            self.recorder.close()

    def _build(self, config: RouterConfig) -> None:
        """:raises ConfigError: some stack cannot start; it must not wait for its first worker to say so."""
        for role in ROLES:
            if role == "aggregated" or getattr(config, role) is not None:
                build_stack(config, self._plugins, role=role)

    def _shadow(self, stack: Stack, config: RouterConfig) -> Shadow | None:
        return None if stack.shadow is None else Shadow(stack.shadow, sample=config.shadow_share, budget=config.shadow_budget)
