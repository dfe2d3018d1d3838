"""No engine core outlives its worker: vLLM's processes do not notice that the one who started them was killed, and would keep their memory.

vLLM calls `die_with_parent` in each of its processes (entry point group `vllm.general_plugins`).
"""

from __future__ import annotations

import os
import signal
import threading
import time

MARK = "DYNAMO_VLLM_WORKER"
"""Environment variable: the worker's process id. Without it vLLM does not run for us."""
_LOOK = 1.0


def die_with_parent() -> None:
    """Watch the parent of this process, unless this is the worker itself."""
    worker = os.environ.get(MARK)
    if worker is None or int(worker) == os.getpid():
        return
    threading.Thread(target=_watch, args=(os.getppid(),), name="watch the parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os.kill(os.getpid(), signal.SIGKILL)
