from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from cyclopts import Parameter

from dynamo_core.cli.options import ConfigFile, Overrides
from dynamo_core.cli.supervisor import Child, Supervisor
from dynamo_core.config import load, load_with_plugins
from dynamo_core.config.load import tables_inside
from dynamo_core.config.schema import Config
from dynamo_core.config.tree import Key
from dynamo_core.frontend.servers.sockets import reserved_port
from dynamo_core.frontend.siblings import meeting_place

log = logging.getLogger(__name__)


def frontend(
    file: ConfigFile = None, /, *,
    port: Annotated[int | None, Parameter(help="Listen here instead of the file's frontend.port.")] = None,
    single: Annotated[bool, Parameter(negative=(), show=False)] = False,
    overrides: Overrides = (),
) -> int:
    """Serve the OpenAI API for the workers of the fleet until SIGTERM or Ctrl-C, then drain."""
    from dynamo_core.frontend.role import serve_frontend
    from dynamo_core.observability import logs
    from dynamo_core.runtime.process import run_role

    if port is not None:
        overrides = (*overrides, f"frontend.port={port}")
    config, plugins = load_with_plugins(file, overrides=overrides, foreign=_foreign)
    logs.setup(config.observability.log_level, config.observability.log_format, role="frontend")
    if config.frontend.processes > 1 and not single:
        arguments = ["frontend", *([str(file)] if file else []), *(f"--set={override}" for override in overrides), "--single"]
        return run_role(lambda stop: _several(config, arguments, stop))
    return run_role(lambda stop: serve_frontend(config, plugins, stop, lambda: load(file, overrides=overrides, plugins=plugins, foreign=_foreign)))


def _foreign(at: Key, written: Mapping[str, Any]) -> bool:
    """Planners run elsewhere, and so do engines that are not inside."""
    return at[0] == "planner" or (at[0] == "workers" and at[1] not in tables_inside(written))


async def _several(config: Config, arguments: list[str], stop: asyncio.Event) -> int:
    """Processes that share the port, each with a router of its own."""
    names = [f"frontend-{copy}" for copy in range(config.frontend.processes)]
    with meeting_place(names) as environments, contextlib.ExitStack() as held:
        if not config.frontend.port:
            arguments = [*arguments, f"--port={held.enter_context(reserved_port(config.frontend.host))}"]
        return await _supervise(config, arguments, names, environments, stop)


async def _supervise(config: Config, arguments: list[str], names: Sequence[str], environments: Sequence[Mapping[str, str]], stop: asyncio.Event) -> int:
    supervisor = Supervisor(lambda name, line: print(f"{name} | {line}", flush=True), grace=config.frontend.drain_timeout)
    supervisor.forward_sighup()
    for name, environment in zip(names, environments, strict=True):
        supervisor.start(Child(name, arguments, environment=environment))
    waiting = [asyncio.create_task(stop.wait()), asyncio.create_task(supervisor.failed.wait())]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    await supervisor.stop()
    for task in waiting:
        task.cancel()
    return 0 if stop.is_set() else 2
