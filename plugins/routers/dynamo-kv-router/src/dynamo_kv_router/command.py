from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from dynamo_core.cli.options import ConfigFile, Overrides
from dynamo_core.config import load, load_with_plugins
from dynamo_core.config.schema import Config, Status
from dynamo_core.errors import ConfigError, Problem
from dynamo_core.plugins import Plugins

log = logging.getLogger(__name__)


def router(
    file: ConfigFile = None, /, *,
    component: Annotated[str, Parameter(help="The component name in `namespace.component.endpoint`.")] = "router",
    host: Annotated[str, Parameter(help="Answer HTTP on this address.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="... and this port; 0 takes any free one.")] = 8092,
    forget_after: Annotated[float, Parameter(validator=Number(gt=0), help="End selected requests that nobody spoke of for so many seconds.")] = 600.0,
    overrides: Overrides = (),
) -> int:
    """Route for others, over the request plane and HTTP: select workers for gateways, pass streams on, tell what is known."""
    from dynamo_core.observability import logs
    from dynamo_core.runtime.process import run_role

    config, plugins = load_with_plugins(file, overrides=overrides)
    logs.setup(config.observability.log_level, config.observability.log_format, role="router")
    return run_role(lambda stop: serve_router(config, plugins, stop, lambda: load(file, overrides=overrides, plugins=plugins), component=component,
                                              status=Status(host, port), silence=forget_after))  # fmt: skip


async def serve_router(config: Config, plugins: Plugins, stop: asyncio.Event, again: Callable[[], Config], *, component: str, status: Status,
                       silence: float) -> int:
    """Serve until `stop` is set. :param again: reads the configuration anew; SIGHUP has the routing stacks follow it.

    :param silence: seconds without a word after which a selected request is taken to have ended.
    """
    from dynamo_core.pipeline.catalog import FleetCatalog
    from dynamo_core.pipeline.reload import follow_sighup
    from dynamo_core.runtime.inside import workers_inside
    from dynamo_core.runtime.runtime import Runtime
    from dynamo_core.runtime.status import serve_status
    from dynamo_core.runtime.worker_role import process_registry
    from dynamo_kv_router.service import RouterService
    from dynamo_kv_router.web import router_app

    registry = process_registry()
    async with (
        Runtime.open(config, plugins) as runtime,
        FleetCatalog.open(runtime, registry) as catalog,
        workers_inside(config, plugins, registry) as inside,
    ):
        catalog.beside.append(inside)
        service = RouterService(catalog, registry, silence=silence)
        follow_sighup(config, catalog, again)
        endpoints = service.endpoints()
        await runtime.serve(component, endpoints)
        async with contextlib.AsyncExitStack() as entered:
            try:
                url = await entered.enter_async_context(serve_status(status, router_app(service)))
            except OSError as e:
                what = f"cannot listen on {status.host}:{status.port}: {os.strerror(e.errno or 0)}"
                raise ConfigError(Problem(what, remedy="choose another --host or --port")) from e
            for endpoint in endpoints:
                await runtime.announce(component, endpoint)
            log.info("routing at %s and at %s.%s.*", url, config.namespace, component)
            await stop.wait()
            for endpoint in endpoints:
                await runtime.withdraw(component, endpoint)
    return 0
