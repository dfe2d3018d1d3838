"""Real processes share a directory: they write at once, are killed, are stopped and go on."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import asynccontextmanager

import pytest

from dynamo_core.discovery.contract import Delete, Put, Synced
from dynamo_core.discovery.file import FileDiscovery
from dynamo_core.errors import LeaseLost, StoreUnavailable

PATIENCE = 30.0

OWNER = """
import asyncio, sys
from pathlib import Path
from dynamo_core.discovery.file import FileDiscovery
from dynamo_core.errors import LeaseLost

async def main(path, key):
    async with FileDiscovery(Path(path), poll_interval=0.05) as store:
        lease = await store.lease(1.5)
        await store.put(key, b"alive", lease)
        print("ready", flush=True)
        await lease.lost.wait()
        print("lost", flush=True)
        try:
            await store.put(key, b"late", lease)
        except LeaseLost:
            print("refused", flush=True)

asyncio.run(main(*sys.argv[1:]))
"""

WRITER = """
import asyncio, random, sys
from pathlib import Path
from dynamo_core.discovery.file import FileDiscovery

async def main(path, name):
    dice = random.Random(name)
    async with FileDiscovery(Path(path), poll_interval=0.05) as store:
        lease = await store.lease()
        print("ready", flush=True)
        for i in range(300):
            key = f"k/{dice.randrange(8)}"
            if dice.random() < 0.3:
                await store.delete(key)
            else:
                await store.put(key, f"{name} {i}".encode(), dice.choice([lease, None]))
        await store.put(f"done/{name}", b"")
        print("done", flush=True)
        sys.stdin.readline()

asyncio.run(main(*sys.argv[1:]))
"""

WATCHER = """
import asyncio, sys
from pathlib import Path
from dynamo_core.discovery.file import FileDiscovery

async def main(path):
    async with FileDiscovery(Path(path), poll_interval=0.01) as store, store.watch("") as changes:
        async for change in changes:
            print("saw", flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@asynccontextmanager
async def process(script, *arguments):
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", script, *map(str, arguments), stdin=pipe, stdout=pipe)
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()
        child._transport.close()


async def says(child):
    return (await asyncio.wait_for(child.stdout.readline(), PATIENCE)).decode().strip()


async def next_of(changes):
    return await asyncio.wait_for(anext(changes), PATIENCE)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "discovery"


async def test_the_keys_of_a_killed_process_disappear(path):
    async with FileDiscovery(path) as store, store.watch("p/") as changes:
        assert await next_of(changes) == Synced()
        async with process(OWNER, path, "p/1") as owner:
            assert await says(owner) == "ready"
            put = await next_of(changes)
            assert (put.key, put.value) == ("p/1", b"alive")
            owner.kill()
            assert await next_of(changes) == Delete("p/1")
            assert await store.items("") == {}
        assert os.listdir(path / "leases") == os.listdir(path / "keys") == []


async def test_a_process_that_was_stopped_for_longer_than_its_lease_knows_that_it_lost_it(path):
    async with FileDiscovery(path) as store, store.watch("p/") as changes:
        async with process(OWNER, path, "p/1") as owner:
            assert await says(owner) == "ready"
            assert isinstance(await next_of(changes), Synced | Put)
            owner.send_signal(signal.SIGSTOP)
            change = await next_of(changes)
            while change != Delete("p/1"):
                change = await next_of(changes)
            owner.send_signal(signal.SIGCONT)
            assert await says(owner) == "lost"
            assert await says(owner) == "refused"
            await asyncio.wait_for(owner.wait(), PATIENCE)
        await store.put("p/end", b"")
        assert await next_of(changes) == Put("p/end", b"")


async def test_a_stopped_process_gives_up_by_itself_even_if_nobody_watched(path):
    async with process(OWNER, path, "p/1") as owner:
        assert await says(owner) == "ready"
        owner.send_signal(signal.SIGSTOP)
        await asyncio.sleep(2.0)
        owner.send_signal(signal.SIGCONT)
        assert await says(owner) == "lost"
        assert await says(owner) == "refused"
    async with FileDiscovery(path) as store:
        assert await store.items("") == {}


async def test_two_processes_that_write_at_once_leave_one_state_that_everybody_sees(path):
    async with FileDiscovery(path, poll_interval=0.05) as store, store.watch("") as changes:
        async with process(WRITER, path, "one") as one, process(WRITER, path, "two") as two:
            assert {await says(one), await says(two)} == {"ready"}
            assert {await says(one), await says(two)} == {"done"}
            model = {}
            while not {"done/one", "done/two"} <= model.keys():
                apply(model, await next_of(changes))
            await store.put("end", b"")
            while "end" not in model:
                apply(model, await next_of(changes))
            async with FileDiscovery(path) as fresh:
                assert model == dict(await store.items("")) == dict(await fresh.items(""))
            assert store.problem() is None


def apply(model, change):
    if isinstance(change, Put):
        model[change.key] = change.value
    elif isinstance(change, Delete):
        model.pop(change.key)


async def test_a_reader_that_is_killed_disturbs_nobody(path):
    async with FileDiscovery(path) as store, process(WATCHER, path) as reader:
        assert await says(reader) == "saw"
        lease = await store.lease()
        for i in range(100):
            await store.put(f"k/{i % 10}", b"%d" % i, lease)
            if i == 50:
                reader.kill()
        assert len(await store.items("k/")) == 10
        assert store.problem() is None


async def test_a_directory_that_somebody_deletes_costs_the_leases_and_comes_back_with_a_new_one(path):
    async with FileDiscovery(path, poll_interval=0.05) as store:
        lease = await store.lease(1.0)
        await store.put("k", b"v", lease)
        await asyncio.to_thread(os.system, f"rm -rf '{path}'")
        await asyncio.wait_for(lease.lost.wait(), PATIENCE)
        assert str(path) in store.problem()
        with pytest.raises(LeaseLost):
            await store.put("k", b"v", lease)
        again = await store.lease(1.0)
        await store.put("k", b"again", again)
        assert await store.items("") == {"k": b"again"}


async def test_a_directory_that_cannot_be_written_is_named_with_the_reason(path):
    async with FileDiscovery(path, poll_interval=0.05) as store:
        await store.put("k", b"v")
        (path / "tmp").rmdir()
        (path / "tmp").write_text("in the way")
        with pytest.raises(StoreUnavailable, match="Not a directory"):
            await store.put("k", b"new")
        assert str(path) in store.problem()
        assert await store.get("k") == b"v"
        (path / "tmp").unlink()
        (path / "tmp").mkdir()
        async with asyncio.timeout(PATIENCE):
            while store.problem():
                await asyncio.sleep(0.05)


async def test_a_store_whose_directory_cannot_be_made_does_not_open(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="file/discovery"):
        async with FileDiscovery(tmp_path / "file" / "discovery"):
            pass


async def test_a_damaged_record_is_in_problem_and_the_others_are_served(path):
    async with FileDiscovery(path, poll_interval=0.05) as store:
        await store.put("k", b"v")
        (path / "keys" / "bad=0").write_bytes(b"garbage")
        assert await store.items("") == {"k": b"v"}
        assert "bad=0" in store.problem()
        await store.delete("bad")
        assert await store.items("") == {"k": b"v"}
        assert store.problem() is None
