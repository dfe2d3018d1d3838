from __future__ import annotations

from dynamo_core.cli.options import ConfigFile, Overrides
from dynamo_core.config import build, load_with_plugins
from dynamo_core.errors import ConfigError, Problem


def run_global(file: ConfigFile = None, /, *, overrides: Overrides = ()) -> int:
    """Keep one GPU budget over several planners, until SIGTERM."""
    from dynamo_core.observability import logs
    from dynamo_core.runtime.process import run_role
    from dynamo_planner.sharing.server import serve_global

    config, plugins = load_with_plugins(file, overrides=overrides)
    if config.planner is None or config.planner.name != "global":
        raise ConfigError(Problem("the configuration has no global planner", config.planner.where if config.planner else "",
                                  remedy='write [planner] use = "global", and its planners'))
    settings = build(config.planner, "planner", plugins)
    logs.setup(config.observability.log_level, config.observability.log_format, role="global planner")
    return run_role(lambda stop: serve_global(settings, plugins, stop))
