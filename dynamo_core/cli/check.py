from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterator
from typing import Any

import attrs

from dynamo_core.cli.options import ConfigFile, Json, Overrides
from dynamo_core.config import Config, Router, load, plugins_for
from dynamo_core.errors import ConfigError, Problem
from dynamo_core.plugins import Component, Plugins


def check(file: ConfigFile = None, /, *, set: Overrides = (), json: Json = False) -> int:
    """Say everything that is wrong with a configuration, without starting anything."""
    plugins = plugins_for(file, overrides=set)
    problems: list[Problem] = []
    routing: dict[str, Any] = {}
    config: Config | None = None
    try:
        config = load(file, overrides=set, plugins=plugins)
        for role, router in _routers(config.router):
            try:
                routing[role] = _facts(router, plugins)
            except ConfigError as e:
                problems += e.problems
    except ConfigError as e:
        problems += e.problems
    if json:
        print(jsonlib.dumps({"ok": not problems, "problems": [attrs.asdict(p) for p in problems], "routing": routing}, indent=2))
    elif problems:
        print("\n\n".join(map(str, problems)), file=sys.stderr)
        print(f"\n{len(problems)} problem{'s' if len(problems) > 1 else ''}", file=sys.stderr)
    elif config is not None:
        print("\n".join(_summary(config, routing)))
        for component in _deprecated(config, plugins):
            about = component.deprecated
            assert about is not None
            print(f"warning: {component.kind} {component.name!r} is deprecated since {about.since} and leaves in {about.removal}; use {about.use!r}", file=sys.stderr)
    return 2 if problems else 0


def _routers(router: Router) -> Iterator[tuple[str, Router]]:
    yield "router", router
    for role in ("prefill", "decode", "encode"):
        if (own := getattr(router, role)) is not None:
            yield f"router.{role}", own


def _facts(router: Router, plugins: Plugins) -> dict[str, str]:
    """Each fact that the stack needs, and who provides it. :raises ConfigError: nobody does."""
    from dynamo_core.routing.stack import build_stack

    stack: Any = build_stack(router, plugins)
    return {getattr(fact, "name", str(fact)): str(provider) for fact, provider in dict(getattr(stack, "provenance", {})).items()}


def _summary(config: Config, routing: dict[str, Any]) -> Iterator[str]:
    yield "The configuration is good."
    yield f"  planes    discovery {config.discovery.name}, requests {config.request_plane.name}, events {config.event_plane.name}"
    yield f"  frontend  {config.frontend.host}:{config.frontend.port}, {config.frontend.http_server.name}"
    for worker in config.workers:
        yield f"  workers   {worker.count} x {worker.name} ({worker.engine.name})"
    for role, facts in routing.items():
        if facts:
            yield f"  {role:<9} needs " + ", ".join(f"{fact} (from {provider})" for fact, provider in facts.items())


def _deprecated(config: Config, plugins: Plugins) -> Iterator[Component]:
    from dynamo_core.config.origins import uses

    for kind, use in uses(config):
        component = plugins.components.get((kind, use.name))
        if component is not None and component.deprecated is not None:
            yield component
