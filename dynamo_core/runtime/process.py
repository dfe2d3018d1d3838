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

        orphaned = False

        def on_orphaned() -> None:
            # The kernel says it once for every thread that the supervisor had: only the first counts.
            nonlocal orphaned
            if not orphaned:
                orphaned = True
                on_signal(signal.SIGTERM)

        def on_signal(number: int) -> None:
            if stop.is_set():
                log.warning("a second signal: ending at once")
                os._exit(128 + number)
            log.info("received %s, draining", signal.Signals(number).name)
            stop.set()

        raise_file_limit()
        if parent := os.environ.get("DYNAMO_SUPERVISED"):
            loop.add_signal_handler(_ORPHANED, on_orphaned)
            _end_with_parent(int(parent))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        collect_rarely()
        return await main(stop)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(body())


def collect_rarely() -> None:
    """What exists after start-up lives for ever: keep the collector of cycles from walking it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


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
_ORPHANED = signal.SIGUSR2
"""What the kernel sends when the supervisor has died."""


def _end_with_parent(parent: int) -> None:
    """Have the kernel say when the supervisor dies, however it dies (Linux)."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, _ORPHANED)
        if os.getppid() != parent:  # it died while this process was starting
            os.kill(os.getpid(), _ORPHANED)


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
