from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dynamo_core.cli.local_stack import LocalStack
from dynamo_core.cli.options import ConfigFile, Overrides
from dynamo_core.cli.screen import Screen
from dynamo_core.config import load_with_plugins
from dynamo_core.config.schema import Config
from dynamo_core.plugins import Plugins


def up(
    file: ConfigFile = None, /, *,
    timeout: Annotated[float, Parameter(help="Seconds to wait until everything is ready.")] = 600.0,
    quiet: Annotated[bool, Parameter(negative=(), help="Do not show the log lines of the roles.")] = False,
    overrides: Overrides = (),
) -> int:
    """Start every role of a stack on this machine, say when it serves, and keep it running until Ctrl-C."""
    from dynamo_core.runtime.process import run_role

    config, plugins = load_with_plugins(file, overrides=overrides)
    screen = Screen(sys.stderr, verbose=not quiet)
    return run_role(lambda stop: _up(file, overrides, config, plugins, screen, quiet, timeout, stop))


async def _up(file: Path | None, overrides: tuple[str, ...], config: Config, plugins: Plugins, screen: Screen, quiet: bool, timeout: float,
              stop: asyncio.Event) -> int:
    async with LocalStack.open(file, overrides, config, plugins, screen.line) as stack:
        if not sys.stdin.isatty():  # in a terminal SIGHUP means that it was closed
            stack.supervisor.forward_sighup()
        stopping = asyncio.create_task(stop.wait())
        ready = asyncio.create_task(stack.wait_ready(screen.progress, timeout))
        await asyncio.wait((stopping, ready), return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            ready.cancel()
        else:
            if ready.exception() is not None and quiet:
                screen.say_tail()
            url = ready.result()
            screen.say(f"ready: {stack.wanted} workers behind {url}")
            screen.say(f"  try  dynamo chat --url {url} 'Hello'")
            failed = asyncio.create_task(stack.supervisor.failed.wait())
            await asyncio.wait((stopping, failed), return_when=asyncio.FIRST_COMPLETED)
            failed.cancel()
        stopping.cancel()
        screen.say("stopping")
    screen.say("stopped")
    return 0 if stop.is_set() else 1
