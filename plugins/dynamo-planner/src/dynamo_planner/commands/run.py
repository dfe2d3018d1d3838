from __future__ import annotations

import os

from dynamo_core.cli.options import ConfigFile, Overrides
from dynamo_core.config import load_with_plugins


def run(file: ConfigFile = None, /, *, overrides: Overrides = ()) -> int:
    """Decide how many workers there are, every few seconds, until SIGTERM."""
    from dynamo_core.observability import logs
    from dynamo_core.runtime.process import run_role
    from dynamo_planner.role import serve_planner

    config, plugins = load_with_plugins(file, overrides=overrides)
    if file is not None:
        os.environ["DYNAMO_CONFIG"] = str(file.resolve())  # a connector, and the workers that it starts, read the same file
    logs.setup(config.observability.log_level, config.observability.log_format, role="planner")
    return run_role(lambda stop: serve_planner(config, plugins, stop))
