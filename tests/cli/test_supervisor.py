"""Child processes of `dynamo up`, with real processes in the place of roles."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys

import pytest

from dynamo_core.cli import supervisor as module
from dynamo_core.cli.supervisor import Child, Supervisor
from dynamo_core.frontend.servers.sockets import listening, reserved_port


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch):
    """A supervisor whose children run a script in place of the `dynamo` command."""
    said: list[tuple[str, str]] = []
    real = asyncio.create_subprocess_exec

    async def run(*command: str, **options: object) -> asyncio.subprocess.Process:
        return await real(sys.executable, "-c", command[3], **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module.asyncio, "create_subprocess_exec", run)
    return Supervisor(lambda name, line: said.append((name, line)), grace=0.2), said


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)


async def test_an_endless_line_is_shown_in_pieces_and_the_child_goes_on(supervised) -> None:
    keeper, said = supervised
    keeper.start(Child("talker", ["print('x' * 300_000); print('after', flush=True); import time; time.sleep(60)"]))
    await until(lambda: ("talker", "after") in said)
    assert sum(line.count("x") for _, line in said) == 300_000
    await keeper.stop()


async def test_a_child_that_crashes_is_started_again_and_one_with_a_wrong_configuration_is_not(supervised) -> None:
    keeper, said = supervised
    keeper.start(Child("wrong", ["raise SystemExit(2)"]))
    keeper.start(Child("crashing", ["import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]))
    await keeper.failed.wait()
    assert keeper.lost.name == "wrong"
    await until(lambda: any("ended (SIGKILL); starting again in 0.5 s" in line for _, line in said))
    await until(lambda: keeper.children[1].restarts >= 2)
    await keeper.stop()


async def test_a_child_that_ignores_sigterm_is_killed_when_its_time_is_up(supervised, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_GRACE", 0.1)
    keeper, said = supervised
    keeper.start(Child("stubborn", ["import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"]))
    await until(lambda: ("stubborn", "up") in said)
    process = keeper.children[0].process
    await keeper.stop()
    assert process.returncode == -signal.SIGKILL


async def test_frontends_stop_before_workers(supervised) -> None:
    keeper, said = supervised
    script = "import signal, sys, time\nsignal.signal(15, lambda *_: (print('stopping', flush=True), sys.exit(0)))\nprint('up', flush=True)\nwhile True: time.sleep(0.1)"
    keeper.start(Child("worker", [script], rank=1))
    keeper.start(Child("frontend", [script], rank=0))
    await until(lambda: {("worker", "up"), ("frontend", "up")} <= set(said))
    await keeper.stop()
    assert [name for name, line in said if line == "stopping"] in (["frontend", "worker"], ["frontend"], [])
    assert all(child.process.returncode == 0 for child in keeper.children)


def test_a_reserved_port_is_shared_by_those_who_ask_for_it_and_receives_nothing_itself() -> None:
    with reserved_port("127.0.0.1") as port:
        servers = [listening("127.0.0.1", port, reuse_port=True) for _ in range(2)]
        clients = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(20)]
        accepted = 0
        for server in servers:
            while True:
                try:
                    server.accept()[0].close()
                    accepted += 1
                except BlockingIOError:
                    break
        assert accepted == 20
        for sock in (*servers, *clients):
            sock.close()


def test_a_role_whose_parent_died_while_it_started_ends() -> None:
    script = """
import sys
from dynamo_core.runtime.process import run_role

async def role(stop):
    await stop.wait()
    return 7

sys.exit(run_role(role))
"""
    orphan = subprocess.run([sys.executable, "-c", script], env={**os.environ, "DYNAMO_SUPERVISED": "999999"}, timeout=60, check=False)
    assert orphan.returncode == 7


async def test_a_retired_child_ends_for_good_and_the_others_stay(supervised) -> None:
    keeper, said = supervised
    script = "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(0))\nprint('up', flush=True)\nwhile True: time.sleep(0.1)"
    leaving, staying = Child("leaving", [script]), Child("staying", [script])
    for child in (leaving, staying):
        keeper.start(child)
    await until(lambda: {("leaving", "up"), ("staying", "up")} <= set(said))
    await keeper.retire(leaving)
    assert leaving.exit_code == 0
    assert keeper.children == [staying]
    assert staying.process.returncode is None
    await keeper.stop()


async def test_a_child_that_waits_to_be_started_again_can_be_retired(supervised) -> None:
    keeper, said = supervised
    child = Child("crashing", ["raise SystemExit(1)"])
    keeper.start(child)
    await until(lambda: any("starting again" in line for _, line in said))
    await keeper.retire(child)
    assert keeper.children == []
    assert child.process.returncode is not None
    await keeper.stop()


async def test_a_child_that_is_retired_while_its_process_is_made_ends_as_well(supervised) -> None:
    keeper, _ = supervised
    child = Child("early", ["import time; time.sleep(300)"])
    keeper.start(child)
    await asyncio.sleep(0)
    await keeper.retire(child)
    assert child.process is None or child.process.returncode is not None
    assert keeper.children == []
    await keeper.stop()


async def test_a_child_has_the_variables_that_it_was_given(supervised) -> None:
    keeper, said = supervised
    keeper.start(Child("reader", ["import os; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); import time; time.sleep(60)"],
                       environment={"CUDA_VISIBLE_DEVICES": "2,3"}))
    await until(lambda: ("reader", "2,3") in said)
    await keeper.stop()
