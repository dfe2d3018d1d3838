"""How a role runs as a process: event loop, signals, and the exit code that it deserves."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


def run_role(main: Callable[[asyncio.Event], Awaitable[int]]) -> int:
    """Run `main(stop)` until it returns its exit code.

    The first SIGTERM or SIGINT sets `stop`, and the role drains; the second ends the process at once.
    """

    async def body() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        parent = int(os.environ.get("DYNAMO_SUPERVISED", 0))
        orphaned_until = 0.0

        def on_signal(number: int) -> None:
            nonlocal orphaned_until
            if not stop.is_set() and parent and os.getppid() != parent:
                # The kernel says so once for every thread that the supervisor had, all within a moment.
                orphaned_until = loop.time() + _ORPHANED
            if stop.is_set() and loop.time() < orphaned_until:
                return
            if stop.is_set():
                log.warning("a second signal: ending at once")
                os._exit(128 + number)
            log.info("received %s, draining", signal.Signals(number).name)
            stop.set()

        raise_file_limit()
        if parent:
            _end_with_parent(parent)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        # What exists after start-up lives for ever: keep the collector from walking it again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)
        return await main(stop)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(body())


def raise_file_limit() -> None:
    """As many open files as this user may have: each client and each worker is one, and the usual default of 1,024 is soon reached."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as e:
            log.warning("no more than %d files can be open at once: %s", soft, e)


_MANY_FILES = 1 << 20
_ORPHANED = 1.0
"""Seconds after the death of the supervisor in which further signals are taken for echoes of it."""


def _end_with_parent(parent: int) -> None:
    """Have the kernel send SIGTERM when the supervisor dies, however it dies (Linux)."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died while this process was starting
            os.kill(os.getpid(), signal.SIGTERM)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop where there is one."""
    if sys.platform != "win32":
        try:
            import uvloop
        except ImportError:
            pass
        else:
            return uvloop.new_event_loop()
    return asyncio.new_event_loop()
