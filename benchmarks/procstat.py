"""CPU time and memory of process trees, from /proc alone, so that every system is measured alike.

CPU is user + system time of all threads of the live tree, plus that of the children it has reaped. The kernel scales the sum to what
its scheduler counted, so it is exact to one tick (10 ms).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")


def tree(roots: Iterable[int]) -> list[int]:
    """Every live process below `roots`, these included."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat(int(name))) is not None:
            children.setdefault(int(fields[1]), []).append(int(name))
    found: dict[int, None] = {}
    todo = list(roots)
    while todo:
        pid = todo.pop()
        if pid not in found and Path(f"/proc/{pid}").exists():
            found[pid] = None
            todo += children.get(pid, ())
    return list(found)


def cpu(roots: Iterable[int]) -> float:
    """Seconds of CPU that the trees have used so far."""
    return sum(sum(map(int, fields[11:15])) for pid in tree(roots) if (fields := _stat(pid)) is not None) * TICK


def memory(roots: Iterable[int]) -> dict[str, float]:
    """Resident now and at the peak, in MB (10^6 bytes), summed over the trees; processes and threads."""
    total = {"resident_mb": 0.0, "peak_mb": 0.0, "processes": 0.0, "threads": 0.0}
    for pid in tree(roots):
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        except OSError:
            continue
        if "VmRSS" in status:
            total["resident_mb"] += int(status["VmRSS"].split()[0]) * 1024 / 1e6
            total["peak_mb"] += int(status["VmHWM"].split()[0]) * 1024 / 1e6
            total["processes"] += 1
            total["threads"] += int(status["Threads"])
    return total


def reset_peak(roots: Iterable[int]) -> None:
    """Start counting the peak anew."""
    for pid in tree(roots):
        try:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        except OSError:
            pass


def busy() -> float:
    """Seconds of CPU that the whole machine has used."""
    values = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, interrupts, soft, *_ = map(int, values)
    return (user + nice + system + interrupts + soft) * TICK


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; `None` for a process that is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] == "Z" else fields
