"""A network between two namespaces of this machine that can be cut, slowed down and made to lose packets.

Two TUN devices with a process between them that carries every packet, late or not at all: real IP packets of real sockets, so that the
kernel's own retransmission is part of what is tested. It needs no kernel module for traffic shaping, but it does need root.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections.abc import Generator

import attrs

NEAR, FAR = "10.77.0.1", "10.77.0.2"
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000


@attrs.define
class Link:
    name: str
    process: subprocess.Popen[str]
    near: str = NEAR
    far: str = FAR

    @property
    def prefix(self) -> tuple[str, ...]:
        """What runs a command at the far end."""
        return ("ip", "netns", "exec", self.name)

    def be(self, *, up: bool = True, delay: float = 0.0, loss: float = 0.0) -> None:
        """:param delay: seconds, in each direction. :param loss: share of the packets that vanish."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"up": up, "delay": delay, "loss": loss}) + "\n")
        self.process.stdin.flush()


def available() -> str | None:
    """Why there can be no such network here; `None`: there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not os.path.exists("/dev/net/tun"):
        return "there is no /dev/net/tun"
    return None


@contextlib.contextmanager
def link(seed: int) -> Generator[Link]:
    name = f"chaos-{os.getpid() % 10000}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    process = None
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.chaos.network", name, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the network did not come up")
        yield Link(name, process)
    finally:
        if process is not None:
            process.kill()
            process.wait()
        subprocess.run(["ip", "netns", "del", name], check=False)


def _tun(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return device


def _address(device: str, own: str, other: str) -> None:
    for command in (f"ip addr add {own} peer {other} dev {device}", f"ip link set {device} up txqueuelen 2000", "ip link set lo up"):
        subprocess.run(command.split(), check=True)


def carry(namespace: str, seed: int) -> None:
    """Pass packets until the controlling end of stdin is gone."""
    device = f"c{os.getpid() % 100000}"
    near = _tun(device)
    _address(device, NEAR, FAR)
    with open(f"/run/netns/{namespace}") as there:
        if ctypes.CDLL(None, use_errno=True).setns(there.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    far = _tun(device)
    _address(device, FAR, NEAR)
    print("ready", flush=True)
    dice, state = random.Random(seed), {"up": True, "delay": 0.0, "loss": 0.0}
    on_the_way: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        wait = None if not on_the_way else max(0.0, on_the_way[0][0] - time.monotonic())
        readable, _, _ = select.select([near, far, sys.stdin], [], [], wait)
        if sys.stdin in readable:
            if not (line := sys.stdin.readline()):
                return
            state = json.loads(line)
        for source, sink in ((near, far), (far, near)):
            if source in readable:
                for _ in range(64):
                    try:
                        packet = os.read(source, 65536)
                    except BlockingIOError:
                        break
                    if not state["up"] or dice.random() < state["loss"]:
                        continue
                    number += 1
                    heapq.heappush(on_the_way, (time.monotonic() + state["delay"], number, sink, packet))
        now = time.monotonic()
        while on_the_way and on_the_way[0][0] <= now:
            _, _, sink, packet = heapq.heappop(on_the_way)
            with contextlib.suppress(OSError):
                os.write(sink, packet)


if __name__ == "__main__":
    carry(sys.argv[1], int(sys.argv[2]))
