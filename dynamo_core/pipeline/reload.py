"""SIGHUP: the routers of this process decide by the configuration as it is now."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable

from dynamo_core.config.schema import Config
from dynamo_core.errors import ConfigError
from dynamo_core.pipeline.catalog import FleetCatalog

log = logging.getLogger(__name__)


def follow_sighup(config: Config, catalog: FleetCatalog, again: Callable[[], Config]) -> None:
    """Read the configuration anew (`again`) at each SIGHUP; one that cannot be used changes nothing. :param config: the one in use."""

    def reload() -> None:
        try:
            done = catalog.stacks.reload(again(), config)
        except ConfigError as e:
            log.error("the configuration cannot be used, the one in use stays: %s", e)
            return
        log.info("routing by configuration %d%s", done.generation, "" if done.changed else ", which has not changed")
        if done.needs_restart:
            log.warning("these settings have changed and need a restart: %s", ", ".join(done.needs_restart))

    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # no signals on this platform, or not in this thread
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
