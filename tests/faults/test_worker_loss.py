"""`kill -9` of workers under load: nobody's request fails, and every answer is token for token what it would have been."""

from __future__ import annotations

import os
import signal

import pytest


@pytest.mark.slow
async def test_killing_any_worker_fails_no_request(field, load_class) -> None:
    async with field(workers=4, frontends=2) as running:
        load = load_class(running.url, streams=24, tokens=60)
        await load.learn(6)
        async with load.under_way():
            await load.until_done(24)
            for victim in running.children("backend")[:3]:
                os.kill(victim.process.pid, signal.SIGKILL)
                await load.until_done(36)
        assert dict(load.failures) == {}


@pytest.mark.slow
async def test_killing_the_only_worker_only_delays_its_requests(field, load_class) -> None:
    async with field(workers=1, frontends=1) as running:
        load = load_class(running.url, streams=8, tokens=300)
        await load.learn(4)
        # Only requests that had the worker: what comes new is answered 503 while nobody is there, unless `frontend.hold` is set.
        await load.once(lambda: os.kill(running.children("backend")[0].process.pid, signal.SIGKILL))
        assert dict(load.failures) == {}
        assert load.done == 8


@pytest.mark.slow
async def test_with_hold_the_loss_of_the_only_worker_delays_new_requests_as_well(field, load_class) -> None:
    async with field(workers=1, frontends=1, frontend="[frontend.hold]") as running:
        load = load_class(running.url, streams=8, tokens=60)
        await load.learn(4)
        async with load.under_way():
            for _ in range(2):
                await load.until_done(10)
                os.kill(running.children("backend")[0].process.pid, signal.SIGKILL)
            await load.until_done(30)
        assert dict(load.failures) == {}


@pytest.mark.slow
async def test_a_worker_that_hangs_is_left_behind(field, load_class) -> None:
    async with field(workers=3, frontends=1) as running:
        load = load_class(running.url, streams=12, tokens=60)
        await load.learn(4)
        async with load.under_way():
            await load.until_done(20)
            pid = running.children("backend")[0].process.pid
            os.kill(pid, signal.SIGSTOP)
            try:
                await load.until_done(100)
            finally:
                os.kill(pid, signal.SIGCONT)
        assert dict(load.failures) == {}


@pytest.mark.slow
async def test_a_rolling_restart_of_every_worker_fails_no_request(field, load_class) -> None:
    async with field(workers=3, frontends=1) as running:
        load = load_class(running.url, streams=12, tokens=60)
        await load.learn(4)
        async with load.under_way():
            await load.until_done(10)
            for victim in running.children("backend"):
                before = victim.process
                before.send_signal(signal.SIGTERM)
                await before.wait()
                await load.until_done(40)
        assert dict(load.failures) == {}
