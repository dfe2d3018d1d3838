from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import attrs
from cyclopts import Parameter

from dynamo_core.cli.options import ConfigFile, Overrides
from dynamo_core.config import Use, Worker, load_with_plugins
from dynamo_core.config.load import tables_inside
from dynamo_core.config.schema import Config
from dynamo_core.config.tree import Key
from dynamo_core.errors import ConfigError, Problem


def worker(
    file: ConfigFile = None, /, *,
    engine: Annotated[str | None, Parameter(help="Serve this engine, with its default options, whatever the file says.")] = None,
    index: Annotated[int | None, Parameter(help="Which [[workers]] table of the file, from 0. Default: the first that is not inside a frontend.")] = None,
    overrides: Overrides = (),
) -> int:
    """Serve one engine until SIGTERM or Ctrl-C, then drain."""
    from dynamo_core.observability import logs
    from dynamo_core.runtime.process import run_role
    from dynamo_core.runtime.worker_role import serve_worker

    def foreign(at: Key, written: Mapping[str, Any]) -> bool:
        if at[0] == "workers":  # an engine that is named here is checked when it is built
            return engine is not None or at[1] != (_first(tables_inside(written)) if index is None else index)
        return at[0] in ("frontend", "router", "around", "planner")

    config, plugins = load_with_plugins(file, overrides=overrides, foreign=foreign)
    settings = _settings(config, engine, index)
    logs.setup(config.observability.log_level, config.observability.log_format, role=settings.name)
    return run_role(lambda stop: serve_worker(config, settings, plugins, stop))


def _settings(config: Config, engine: str | None, index: int | None) -> Worker:
    if engine is not None:
        same = [settings for settings in config.workers if settings.engine.name == engine]
        return same[0] if same else attrs.evolve(config.workers[0] if config.workers else Worker(), engine=Use(engine))
    if not config.workers:
        raise ConfigError(Problem("the configuration has no [[workers]] table", remedy="add one, or name an engine: dynamo worker --engine echo"))
    inside = {number for number, settings in enumerate(config.workers) if settings.inside}
    chosen = _first(inside) if index is None else index
    if index is None and chosen == len(config.workers):
        raise ConfigError(Problem("every [[workers]] table of the file is inside the process that routes", remedy="start that: dynamo frontend"))
    if chosen >= len(config.workers):
        raise ConfigError(Problem(f"there is no [[workers]] table {chosen}; the file has {len(config.workers)}"))
    if chosen in inside:
        raise ConfigError(Problem(f"[[workers]] table {chosen} is inside the process that routes, which runs it already",
                                  remedy=f"a worker more, in a process of its own: --set workers.{chosen}.inside=false"))
    return config.workers[chosen]


def _first(inside: Collection[int]) -> int:
    """The first table that has processes of its own."""
    return next(number for number in itertools.count() if number not in inside)
