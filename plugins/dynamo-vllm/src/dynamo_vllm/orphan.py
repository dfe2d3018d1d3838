"""No engine core outlives its worker: vLLM's processes do not notice that the one who started them was killed, and would keep their memory.

vLLM calls `die_with_parent` in each of its processes but one (entry point group `vllm.general_plugins`). That one, which coordinates data-parallel ranks,
is ended by an engine core that finds its worker gone.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

MARK = "DYNAMO_VLLM_WORKER"
"""Environment variable: the worker's process id. Without it vLLM does not run for us."""
_LOOK = 1.0


def die_with_parent() -> None:
    """Watch the parent of this process, unless this is the worker itself."""
    worker = os.environ.get(MARK)
    if worker is None or int(worker) == os.getpid():
        return
    threading.Thread(target=_watch, args=(os.getppid(), worker), name="watch the parent", daemon=True).start()


def _watch(parent: int, worker: str) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK)
    if not Path("/proc", worker).exists():
        _end_others(worker)
    os.kill(os.getpid(), signal.SIGKILL)


def _end_others(worker: str) -> None:
    """End every process that was started for this worker, which is gone (Linux)."""
    mark = f"{MARK}={worker}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int(process.name) != os.getpid() and mark in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:  # it is gone, or another user's
            continue
