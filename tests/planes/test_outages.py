"""The store or the broker of a whole stack goes away under load: what is known serves on, and everything finds itself again."""

from __future__ import annotations

import asyncio
import itertools

import pytest

pytestmark = pytest.mark.slow
_numbers = itertools.count()


def workers(health) -> int:
    return sum(bool(worker.get("proven")) for model in health.get("models", {}).values() for worker in model.get("workers", ()))


@pytest.fixture
def etcd(etcd_server):
    return etcd_server()


@pytest.fixture
def nats(nats_server):
    return nats_server()


@pytest.fixture
def over_etcd(etcd):
    return {"use": "etcd", "endpoints": etcd.endpoints, "prefix": f"outage-{next(_numbers)}/", "timeout": 2.0}


async def test_while_etcd_is_away_requests_in_progress_and_new_ones_go_on(stack, load_on, etcd, over_etcd) -> None:
    async with stack(over_etcd, {"use": "tcp"}, {"use": "zmq"}, lease_ttl=5.0) as running:
        load = load_on(running.url)
        async with load.under_way():
            await load.until_done(10)
            etcd.kill()
            health = await running.until(lambda health: "etcd does not answer" in str(health))
            assert workers(health) == 2, "an outage is no empty fleet"
            started = load.done
            await asyncio.sleep(15)
            assert load.done > started + 20
            await asyncio.to_thread(etcd.start)
            health = await running.until(lambda health: "etcd does not answer" not in str(health))
            await load.until_done(10)
            await asyncio.sleep(6)  # longer than a lease: who was not alive to etcd would be gone by now
            assert workers(await running.health()) == 2
        assert dict(load.failures) == {}


async def test_when_etcd_lost_its_data_everything_registers_again_and_no_request_fails(stack, load_on, etcd, over_etcd) -> None:
    async with stack(over_etcd, {"use": "tcp"}, {"use": "zmq"}, lease_ttl=5.0) as running:
        before = {worker["id"] for worker in ids(await running.health())}
        load = load_on(running.url)
        async with load.under_way():
            await load.until_done(10)
            etcd.kill()
            etcd.wipe()
            await asyncio.to_thread(etcd.start)
            await running.until(lambda health: workers(health) == 2 and not before & {worker["id"] for worker in ids(health)})
            await load.until_done(20)
        assert dict(load.failures) == {}


def ids(health):
    return [worker for model in health.get("models", {}).values() for worker in model.get("workers", ())]


async def test_a_restart_of_nats_is_a_pause_for_streams_that_run_through_it(stack, load_on, nats, over_etcd) -> None:
    through = {"use": "nats", "servers": nats.servers}
    async with stack(over_etcd, through, through) as running:
        load = load_on(running.url)
        async with load.under_way():
            await load.until_done(10)
            for _ in range(3):
                nats.kill()
                await asyncio.sleep(1.0)
                await asyncio.to_thread(nats.start)
                await load.until_done(15)
        assert dict(load.failures) == {}


async def test_losing_a_member_of_the_etcd_and_of_the_nats_cluster_fails_nothing(stack, load_on, etcd_server, nats_server) -> None:
    etcd, nats = etcd_server(nodes=3), nats_server(nodes=3)
    through = {"use": "nats", "servers": nats.servers}
    async with stack({"use": "etcd", "endpoints": etcd.endpoints, "timeout": 5.0}, through, {**through, "durable": True, "replicas": 3}) as running:
        load = load_on(running.url)
        async with load.under_way():
            await load.until_done(10)
            etcd.nodes[etcd.leader()].kill()
            await load.until_done(15)
            nats.nodes[0].kill()
            await load.until_done(15)
            await asyncio.to_thread(etcd.start)
            await asyncio.to_thread(nats.start)
            await load.until_done(10)
        assert dict(load.failures) == {}
        assert workers(await running.health()) == 2
