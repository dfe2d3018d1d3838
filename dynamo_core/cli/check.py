from __future__ import annotations

import difflib
import json as jsonlib
import sys
from collections.abc import Iterator

import attrs

from dynamo_core.cards import Role
from dynamo_core.cli.options import ConfigFile, Json, Overrides
from dynamo_core.config import Config, Router, build, load, plugins_for
from dynamo_core.config.origins import uses
from dynamo_core.engines import Checks
from dynamo_core.errors import ConfigError, Problem
from dynamo_core.frontend.certificates import unusable
from dynamo_core.plugins import Plugins
from dynamo_core.routing.stack import build_stack
from dynamo_core.transport.tls import PlaneTls, client_context


def check(file: ConfigFile = None, /, *, set: Overrides = (), json: Json = False) -> int:
    """Say everything that is wrong with a configuration, without starting anything."""
    plugins = plugins_for(file, overrides=set)
    problems: list[Problem] = []
    routing: dict[str, dict[str, str]] = {}
    config: Config | None = None
    try:
        config = load(file, overrides=set, plugins=plugins)
        for table, role in _roles(config.router):
            try:
                routing[table] = _facts(config.router, plugins, role)
            except ConfigError as e:
                problems += e.problems
        problems += _engines(config, plugins)
        problems += _certificates(config, plugins)
    except ConfigError as e:
        problems += e.problems
    if json:
        print(jsonlib.dumps({"ok": not problems, "problems": [attrs.asdict(p) for p in problems], "routing": routing}, indent=2))
    elif problems:
        print("\n\n".join(map(str, problems)), file=sys.stderr)
        print(f"\n{len(problems)} problem{'s' if len(problems) > 1 else ''}", file=sys.stderr)
    elif config is not None:
        print("\n".join(_summary(config, routing)))
        for warning in _warnings(config, plugins):
            print(f"warning: {warning}", file=sys.stderr)
    return 2 if problems else 0


def _roles(router: Router) -> Iterator[tuple[str, Role]]:
    yield "router", "aggregated"
    roles: tuple[Role, ...] = ("prefill", "decode", "encode")
    for role in roles:
        if getattr(router, role) is not None:
            yield f"router.{role}", role


def _facts(router: Router, plugins: Plugins, role: Role) -> dict[str, str]:
    """Each fact that the stack needs, and which provider fills it. :raises ConfigError: nobody does."""
    stack = build_stack(router, plugins, role=role)
    provider = {fact.name: part.use for part in reversed(stack.providers) for fact in part.component.provides}
    return {name: provider[name] for name in sorted(fact.name for fact in stack.needs)}


def _engines(config: Config, plugins: Plugins) -> Iterator[Problem]:
    for worker in config.workers:
        engine = build(worker.engine, "engine", plugins)
        if isinstance(engine, Checks):
            try:
                engine.check(config if worker.namespace is None else attrs.evolve(config, namespace=worker.namespace), plugins)
            except ConfigError as e:
                yield from e.problems


def _certificates(config: Config, plugins: Plugins) -> Iterator[Problem]:
    if config.frontend.tls is not None:
        yield from unusable(config.frontend.tls)
    plane = build(config.request_plane, "request_plane", plugins)
    if isinstance(tls := getattr(plane, "tls", None), PlaneTls):
        try:
            client_context(tls)
        except ConfigError as e:
            yield from e.problems


def _summary(config: Config, routing: dict[str, dict[str, str]]) -> Iterator[str]:
    yield "The configuration is good."
    yield f"  planes    discovery {config.discovery.name}, requests {config.request_plane.name}, events {config.event_plane.name}"
    yield f"  frontend  {config.frontend.host}:{config.frontend.port}, {config.frontend.http_server.name}"
    for worker in config.workers:
        where = (f" in {worker.namespace}" if worker.namespace else "") + (" inside the process that routes" if worker.inside else "")
        yield f"  workers   {worker.count} x {worker.name} ({worker.engine.name}){where}"
    for table, facts in routing.items():
        for fact, provider in facts.items():
            yield f"  {table:<9} needs {fact}, from {provider}"


def _warnings(config: Config, plugins: Plugins) -> Iterator[str]:
    """What is no mistake everywhere, and probably one here."""
    for kind, use in uses(config):
        component = plugins.components.get((kind, use.name))
        if component is not None and (about := component.deprecated) is not None:
            yield f"{component.kind} {component.name!r} is deprecated since {about.since} and leaves in {about.removal}; use {about.use!r}"
    installed = {name for plugin in plugins.plugins for name in (plugin.name, plugin.distribution) if name}
    for name in sorted(set(config.plugins.disabled) - installed):
        close = difflib.get_close_matches(name, installed, 1)
        yield f"plugins.disabled: no plugin {name!r} is installed" + (f"; did you mean {close[0]!r}?" if close else "")
    for kind, use in (("discovery", config.discovery), ("request_plane", config.request_plane), ("event_plane", config.event_plane)):
        if use.name in ("memory", "in-process") and not (config.workers and all(worker.inside for worker in config.workers)):
            yield f"{kind} {use.name!r} stays inside one process: `dynamo up`, `dynamo frontend` and `dynamo worker` are several"
