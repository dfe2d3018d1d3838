"""Tells metrics and plugins of what happens. A plugin's hook that raises is logged under its name and hurts nobody."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from dynamo_core.pipeline.metrics import PipelineMetrics
from dynamo_core.plugins import Plugins
from dynamo_core.routing.facts import OVERLAP_TOKENS
from dynamo_core.routing.record import Decision
from dynamo_core.routing.recorder import Recorder
from dynamo_core.routing.regret import regret_of, stale_tokens
from dynamo_core.routing.shadow import Beside, Shadow

log = logging.getLogger(__name__)


class Watcher:
    """Implements `routing.router.Observer`."""

    def __init__(self, metrics: PipelineMetrics, plugins: Plugins, recorder: Recorder | None = None) -> None:
        self._beside: Beside | None = None
        self._recorder = recorder
        self._metrics = metrics
        self._plugins = plugins
        self._anybody = bool(plugins.manager.hook.dynamo_decision.get_hookimpls())

    @property
    def shadow(self) -> Shadow | None:
        return None if self._beside is None else self._beside.shadow

    def shadow_by(self, shadow: Shadow | None) -> None:
        """Have decisions compared with those of this one from now on, or with nobody's."""
        if self._beside is not None:
            self._beside.close()
        self._beside = None if shadow is None else Beside(shadow, self._metrics.shadowed)

    def decided(self, decision: Decision, seconds: float) -> None:
        self._metrics.decided(seconds)
        if self._recorder is not None:
            self._recorder.record(decision)
        if self._anybody:
            tell(self._plugins, "dynamo_decision", decision=decision)
        if not decision.dry_run and (self._beside is not None or OVERLAP_TOKENS in decision.columns):
            # After the request is on its way.
            asyncio.get_running_loop().call_soon(self._look_back, decision)

    def _look_back(self, decision: Decision) -> None:
        tokens, cause = regret_of(decision)
        if tokens:
            self._metrics.regret(cause, tokens)
        if self._beside is not None:
            self._beside.follow(decision)

    def found(self, decision: Decision, cached_tokens: int | None) -> None:
        if cached_tokens is None or OVERLAP_TOKENS not in decision.columns:
            return
        self._metrics.predicted(decision.overlap_tokens, cached_tokens)
        if stale := stale_tokens(decision, cached_tokens):
            self._metrics.regret("stale", stale)

    def fault(self, component: str, what: str) -> None:
        self._metrics.fault(component)


def finished_observers(plugins: Plugins) -> list[Callable[..., object]]:
    """What the HTTP surface calls at the end of each request: nothing, unless a plugin listens."""
    if not plugins.manager.hook.dynamo_request_finished.get_hookimpls():
        return []
    return [partial(tell, plugins, "dynamo_request_finished")]


_blamed: set[tuple[str, str]] = set()


def tell(plugins: Plugins, hook: str, **facts: Any) -> None:
    """Call an observer hook of each plugin by itself, so that one that raises is known by name and the others still hear of it."""
    for implementation in getattr(plugins.manager.hook, hook).get_hookimpls():
        try:
            implementation.function(*(facts[name] for name in implementation.argnames))
        except Exception:
            if (blame := (implementation.plugin_name, hook)) not in _blamed:
                _blamed.add(blame)
                log.exception("%s of plugin %s failed; it is logged once", hook, implementation.plugin_name)
