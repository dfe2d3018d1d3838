from __future__ import annotations

from typing import Annotated

import attrs
from cyclopts import Parameter

from dynamo_core.cli.options import ConfigFile, Overrides
from dynamo_core.config import Use, Worker, load_with_plugins
from dynamo_core.config.schema import Config
from dynamo_core.config.tree import Key
from dynamo_core.errors import ConfigError, Problem


def worker(
    file: ConfigFile = None, /, *,
    engine: Annotated[str | None, Parameter(help="Serve this engine, with its default options, whatever the file says.")] = None,
    index: Annotated[int | None, Parameter(help="Which [[workers]] table of the file, from 0. Default: the first.")] = None,
    overrides: Overrides = (),
) -> int:
    """Serve one engine until SIGTERM or Ctrl-C, then drain."""
    from dynamo_core.observability import logs
    from dynamo_core.runtime.process import run_role
    from dynamo_core.runtime.worker_role import serve_worker

    ours = (index or 0) if engine is None else None  # an engine that is named here is checked when it is built

    def foreign(at: Key) -> bool:
        return at[0] in ("frontend", "router", "around", "planner") or (at[0] == "workers" and at[1] != ours)

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
    if (index or 0) >= len(config.workers):
        raise ConfigError(Problem(f"there is no [[workers]] table {index}; the file has {len(config.workers)}"))
    return config.workers[index or 0]
