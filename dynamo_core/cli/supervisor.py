"""Child processes: started with a name, their lines prefixed, restarted when they crash, stopped one by one or all in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import attrs

from dynamo_core.runtime.restarts import Crashes

CONFIGURATION = 2
"""Exit code of a child that will not do better the next time."""
HOPELESS = 5
"""Crashes in a row, none of them after a stable time, after which a child is not started again."""
LONGEST_LINE = 64 * 1024
"""Bytes; a longer line of a child is shown in pieces."""
LAST_GRACE = 5.0
"""Seconds between asking a child to end and ending it, beyond its own drain time."""


@attrs.define(eq=False)
class Child:
    """One role as a process. `rank` gives the order of stopping: lower first."""

    name: str
    arguments: Sequence[str]
    rank: int = 0
    environment: Mapping[str, str] = attrs.field(factory=dict[str, str])
    """Variables that it has besides ours."""
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0
    exit_code: int | None = None
    """Of its last end."""
    hopeless: bool = False
    """It is not started again."""
    leaving: asyncio.Event = attrs.field(factory=asyncio.Event, eq=False, repr=False)
    """It was told to end, and has no successor."""


class Supervisor:
    """Owns the children, and keeps as many as there were: whoever ends has a successor, unless its configuration is wrong."""

    def __init__(self, say: Callable[[str, str], None], *, grace: float) -> None:
        self.children: list[Child] = []
        self.failed = asyncio.Event()
        """A child will not come back."""
        self.lost: Child | None = None
        """Which one."""
        self._say = say
        self._grace = grace
        self._watchers: dict[Child, asyncio.Task[None]] = {}
        self._stopping = False

    def start(self, child: Child) -> None:
        self.children.append(child)
        self._watchers[child] = asyncio.create_task(self._watch(child), name=f"child {child.name}")

    async def retire(self, child: Child) -> None:
        """End one child for good, within its drain time; what does not end is killed. Returns when it has ended."""
        watcher = self._watchers[child]
        child.leaving.set()
        if child.process is not None and child.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGTERM)
        _, late = await asyncio.wait((watcher,), timeout=self._grace + LAST_GRACE)
        if late and child.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)
            await asyncio.wait((watcher,))
        if child in self._watchers:
            del self._watchers[child]
            self.children.remove(child)

    async def _watch(self, child: Child) -> None:
        crashes = Crashes()
        while not self._stopping and not child.leaving.is_set():
            started = time.monotonic()
            child.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "dynamo_core.cli", *child.arguments,
                env={**os.environ, "DYNAMO_SUPERVISED": str(os.getpid()), "PYTHONUNBUFFERED": "1", **child.environment},
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, start_new_session=True,
            )
            if child.leaving.is_set():  # told so while it was being made
                child.process.send_signal(signal.SIGTERM)
            await self._forward(child)
            child.exit_code = await child.process.wait()
            if self._stopping or child.leaving.is_set():
                return
            child.restarts += 1
            if child.exit_code == CONFIGURATION:
                self._say(child.name, "ended because of its configuration; it is not started again")
                self._give_up(child)
                return
            if child.exit_code == 0:
                self._say(child.name, "was asked to end; starting its successor")
                continue
            delay = crashes.pause(time.monotonic() - started)
            if crashes.count > HOPELESS:
                self._say(child.name, f"ended {crashes.count} times in a row; it is not started again")
                self._give_up(child)
                return
            ended = signal.Signals(-child.exit_code).name if child.exit_code < 0 else f"exit code {child.exit_code}"
            self._say(child.name, f"ended ({ended}); starting again in {delay:g} s")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await child.leaving.wait()

    async def _forward(self, child: Child) -> None:
        assert child.process is not None
        assert child.process.stdout is not None
        rest = b""
        while more := await child.process.stdout.read(LONGEST_LINE):
            *lines, rest = (rest + more).split(b"\n")
            if len(rest) > LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._say(child.name, line.decode("utf-8", "replace").rstrip())
        if rest:
            self._say(child.name, rest.decode("utf-8", "replace").rstrip())

    def _give_up(self, child: Child) -> None:
        child.hopeless = True
        self.lost = child
        self.failed.set()

    def send(self, number: int, rank: int = 0) -> None:
        """Give a signal to every child of this rank."""
        for child in self.children:
            if child.rank == rank and child.process is not None and child.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.send_signal(number)

    def forward_sighup(self) -> None:
        """From now on SIGHUP, which has a frontend read its file again, is for all frontends. One that has only just started may start anew for it."""
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError, AttributeError):  # no such signal here, or not in this thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.send, signal.SIGHUP)

    async def stop(self) -> None:
        """End every child, frontends before workers, each within its drain time; what does not end is killed."""
        self._stopping = True
        for rank in sorted({child.rank for child in self.children}):
            group = [child.process for child in self.children if child.rank == rank and child.process and child.process.returncode is None]
            told = [child.process for child in self.children if child.leaving.is_set()]
            for process in group:
                if process not in told:  # a second signal would cut what it still serves
                    with contextlib.suppress(ProcessLookupError):
                        process.send_signal(signal.SIGTERM)
            waiting = [asyncio.create_task(process.wait()) for process in group]
            if waiting:
                _, late = await asyncio.wait(waiting, timeout=self._grace + LAST_GRACE)
                if late:
                    for process in group:
                        if process.returncode is None:
                            with contextlib.suppress(ProcessLookupError):
                                os.killpg(process.pid, signal.SIGKILL)
                    await asyncio.gather(*late)
        for watcher in self._watchers.values():
            watcher.cancel()
        await asyncio.gather(*self._watchers.values(), return_exceptions=True)
