"""The conformance kit of request planes: inherit `RequestPlaneContract`, provide a plane, and pytest does the rest.

The guarantees T1 to T8 are in `docs/contracts/request-plane.md`; each test carries the number of the one that it checks.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from urllib.parse import urlsplit

import pytest

from dynamo_core import errors
from dynamo_core.context import Context
from dynamo_core.contracts.transport_endpoints import EVERYTHING, GARBAGE, Endpoints, numbers
from dynamo_core.errors import Cancelled, CannotConnect, Disconnected, DynamoError, EndpointNotFound, EngineFailed
from dynamo_core.transport.contract import Channel, Item, RequestPlane, Server, Stream
from dynamo_core.types import Output

MiB = 2**20


class RequestPlaneContract:
    """Inherit, and override the fixture `plane`. Both ends run in the test's process, over whatever the plane runs over."""

    guard = 20.0
    """Seconds after which something that does not happen counts as never happening."""
    host = "127.0.0.1"
    listens = True
    """The address names a TCP port, so that strangers can send it garbage."""
    held_outputs = 8192
    """How many outputs of 2000 tokens an unread stream may hold in all buffers together. Kernel buffers count too."""
    held_bytes = 32 * MiB
    """How many bytes an unread stream of bytes may hold in all buffers together."""

    @pytest.fixture
    async def plane(self) -> RequestPlane:
        raise NotImplementedError("override this fixture")

    # ------------------------------------------------------------------ tools of the tests

    @contextlib.asynccontextmanager
    async def pair(self, plane: RequestPlane) -> AsyncGenerator[tuple[Endpoints, Server, Channel]]:
        endpoints = Endpoints()
        server = await plane.serve(endpoints, self.host)
        try:
            async with asyncio.timeout(self.guard * 3):
                channel = await plane.connect(server.address)
                try:
                    yield endpoints, server, channel
                finally:
                    await channel.close()
        finally:
            await server.close()

    async def rest(self, stream: Stream) -> list[Item]:
        """Everything up to the end."""
        items: list[Item] = []
        async with asyncio.timeout(self.guard):
            while more := await stream.read():
                items += more
        return items

    async def first(self, stream: Stream) -> Sequence[Item]:
        async with asyncio.timeout(self.guard):
            return await stream.read()

    async def to_error(self, stream: Stream) -> tuple[list[Item], DynamoError]:
        """Everything up to the error that ends the stream, and the error."""
        items: list[Item] = []
        while True:
            try:
                more = await self.first(stream)
            except DynamoError as error:
                return items, error
            if not more:
                pytest.fail("the stream ended silently")
            items += more

    async def error_of(self, stream: Stream) -> DynamoError:
        """The error that ends the stream."""
        return (await self.to_error(stream))[1]

    async def within(self, event: asyncio.Event, what: str) -> None:
        try:
            async with asyncio.timeout(self.guard):
                await event.wait()
        except TimeoutError:
            pytest.fail(f"never happened: {what}")

    async def until_still(self, measure: Callable[[], int]) -> int:
        """The value once it has stayed the same for a fifth of a second."""
        value, still = measure(), 0
        async with asyncio.timeout(self.guard):
            while still < 5:
                await asyncio.sleep(0.04)
                before, value = value, measure()
                still = still + 1 if value == before else 0
        return value

    # ------------------------------------------------------------------ T1: once and in order

    @pytest.mark.parametrize("scenario", ["healthy", "slow-reader", "cancelling-neighbours", "failing-neighbours", "flood"])
    async def test_t1_every_item_arrives_once_and_in_order_on_200_streams(self, plane: RequestPlane, scenario: str) -> None:
        dice = random.Random(scenario)
        async with self.pair(plane) as (_, _, channel):

            async def one(i: int) -> None:
                n = dice.choice((0, 1, 2, 17, 60, 120))
                context = Context(f"{scenario}-{i}")
                if scenario == "cancelling-neighbours" and i % 4 == 0:
                    stream = channel.open("count", b"5000", context)
                    await self.first(stream)
                    stream.cancel()
                    return
                if scenario == "failing-neighbours" and i % 4 == 0:
                    assert isinstance(await self.error_of(channel.open("fail", b"worker_overloaded", context)), errors.WorkerOverloaded)
                    return
                stream = channel.open("flood" if scenario == "flood" else "count", b"%d" % n, context)
                if scenario == "slow-reader" and i % 4 == 0:
                    await asyncio.sleep(dice.random() * 0.3)
                assert numbers(await self.rest(stream)) == list(range(n))

            await asyncio.gather(*(one(i) for i in range(200)))

    async def test_t1_outputs_and_bytes_of_one_stream_keep_their_order(self, plane: RequestPlane) -> None:
        async with self.pair(plane) as (_, _, channel):
            streams = [channel.open("mixed", b"200", Context(f"m{i}")) for i in range(8)]
            for items in await asyncio.gather(*(self.rest(stream) for stream in streams)):
                assert numbers(items) == list(range(200))
                assert [isinstance(item, bytes) for item in items] == [i % 3 == 0 for i in range(200)]

    async def test_t1_an_output_arrives_with_every_field(self, plane: RequestPlane) -> None:
        async with self.pair(plane) as (_, _, channel):
            assert await self.rest(channel.open("everything", b"", Context("e"))) == [EVERYTHING]

    async def test_t1_the_end_stays_the_end(self, plane: RequestPlane) -> None:
        async with self.pair(plane) as (_, _, channel):
            stream = channel.open("count", b"3", Context("e"))
            assert numbers(await self.rest(stream)) == [0, 1, 2]
            assert not await self.first(stream)
            stream.cancel()
            assert not await self.first(stream)

    async def test_t1_large_payloads_travel_both_ways(self, plane: RequestPlane) -> None:
        payloads = [random.Random(i).randbytes(8 * MiB) for i in range(3)]
        async with self.pair(plane) as (_, _, channel):
            streams = [channel.open("echo", payload, Context(f"big-{i}")) for i, payload in enumerate([*payloads, b""])]
            assert [await self.rest(stream) for stream in streams] == [*([payload] for payload in payloads), [b""]]

    async def test_t1_a_handler_that_never_waits_does_not_hold_up_others(self, plane: RequestPlane) -> None:
        async with self.pair(plane) as (_, _, channel):
            endless = channel.open("flood", b"1000000000", Context("endless"))
            await self.first(endless)
            reading = asyncio.create_task(self._keep_reading(endless))
            assert numbers(await self.rest(channel.open("count", b"50", Context("other")))) == list(range(50))
            endless.cancel()
            await reading

    async def _keep_reading(self, stream: Stream) -> None:
        with contextlib.suppress(Cancelled):
            while await stream.read():
                pass

    # ------------------------------------------------------------------ T2: cancellation

    @pytest.mark.parametrize("stage", ["at-once", "before-the-first-item", "in-the-middle", "blocked-on-the-reader"])
    async def test_t2_cancelling_closes_the_iterator_at_every_stage(self, plane: RequestPlane, stage: str) -> None:
        async with self.pair(plane) as (endpoints, _, channel):
            endpoint, payload = {"before-the-first-item": ("wait", b"0"), "in-the-middle": ("wait", b"5")}.get(stage, ("fat", b"1000000"))
            stream = channel.open(endpoint, payload, Context("it"))
            if stage == "before-the-first-item":
                await self.within(endpoints.started("it"), "the handler is called")
            elif stage == "in-the-middle":
                await self.first(stream)
            elif stage == "blocked-on-the-reader":
                await self.until_still(lambda: endpoints.asked.get("it", 0))
            stream.cancel()
            if stage == "at-once":  # the handler may never have been called; nothing may keep running
                await self.until_still(lambda: endpoints.asked.get("it", 0))
                if "it" not in endpoints.contexts:
                    return
            await self.within(endpoints.ended("it"), "the iterator of the cancelled stream is closed")
            assert endpoints.contexts["it"].cancelled

    async def test_t2_what_had_arrived_stays_readable_and_then_it_is_cancelled(self, plane: RequestPlane) -> None:
        async with self.pair(plane) as (_, _, channel):
            stream = channel.open("wait", b"5", Context("it"))
            got = list(await self.first(stream))
            stream.cancel()
            stream.cancel()
            more, error = await self.to_error(stream)
            assert isinstance(error, Cancelled)
            assert numbers([*got, *more]) == list(range(len(got) + len(more)))

    async def test_t2_cancelling_wakes_a_waiting_reader(self, plane: RequestPlane) -> None:
        async with self.pair(plane) as (endpoints, _, channel):
            stream = channel.open("wait", b"0", Context("it"))
            reading = asyncio.create_task(self.error_of(stream))
            await self.within(endpoints.started("it"), "the handler is called")
            stream.cancel()
            assert isinstance(await reading, Cancelled)

    async def test_t2_cancelling_the_context_cancels_the_stream(self, plane: RequestPlane) -> None:
        async with self.pair(plane) as (endpoints, _, channel):
            context = Context("it")
            stream = channel.open("wait", b"1", context)
            await self.first(stream)
            context.cancel("the client left")
            await self.within(endpoints.ended("it"), "the iterator is closed")
            assert isinstance(await self.error_of(stream), Cancelled)
            assert isinstance(await self.error_of(channel.open("count", b"1", context)), Cancelled)

    async def test_t2_a_handler_that_swallows_the_cancellation_is_closed_all_the_same(self, plane: RequestPlane) -> None:
        async with self.pair(plane) as (endpoints, _, channel):
            stream = channel.open("stubborn", b"", Context("it"))
            await self.first(stream)
            stream.cancel()
            await self.within(endpoints.ended("it"), "the iterator is closed")

    async def test_t2_a_cancelled_reader_loses_nothing(self, plane: RequestPlane) -> None:
        async with self.pair(plane) as (endpoints, _, channel):
            stream = channel.open("wait", b"0", Context("it"))
            reading = asyncio.create_task(stream.read())
            await asyncio.sleep(0.05)
            reading.cancel()
            endpoints.gate.set()
            assert numbers(await self.rest(stream)) == [-1]

    # ------------------------------------------------------------------ T3: broken connections

    async def test_t3_a_worker_that_goes_ends_every_stream_with_disconnected(self, plane: RequestPlane) -> None:
        async with self.pair(plane) as (endpoints, server, channel):
            streams = [channel.open("wait", b"2", Context(f"s{i}")) for i in range(20)]
            for stream in streams:
                await self.first(stream)
            await server.close()
            for stream in streams:
                assert isinstance(await self.error_of(stream), Disconnected)
            for i in range(20):
                await self.within(endpoints.ended(f"s{i}"), "the worker closes the iterators of its streams")
            late = await self.error_of(channel.open("count", b"1", Context("late")))
            assert isinstance(late, errors.StreamError)
            assert late.migratable

    async def test_t3_a_caller_that_goes_closes_its_iterators_and_no_others(self, plane: RequestPlane) -> None:
        async with self.pair(plane) as (endpoints, server, channel):
            other = await plane.connect(server.address)
            gone = [other.open("wait", b"1", Context(f"gone{i}")) for i in range(10)]
            stays = channel.open("wait", b"1", Context("stays"))
            for stream in [*gone, stays]:
                await self.first(stream)
            await other.close()
            assert other.closed
            for i, stream in enumerate(gone):
                await self.within(endpoints.ended(f"gone{i}"), "the iterators of the caller that left are closed")
                assert isinstance(await self.error_of(stream), Disconnected)
            endpoints.gate.set()
            assert numbers(await self.rest(stays)) == [-1]

    async def test_t3_nobody_at_the_address_is_cannot_connect(self, plane: RequestPlane) -> None:
        server = await plane.serve(Endpoints(), self.host)
        await server.close()
        with pytest.raises(CannotConnect, match=server.address.rpartition(":")[2]):
            await plane.connect(server.address)

    # ------------------------------------------------------------------ T4: typed errors

    @pytest.mark.parametrize("code", ["worker_overloaded", "worker_draining", "engine_dead", "engine_failed", "endpoint_not_found",
                                      "context_length_exceeded", "stream_timeout", "no_worker"])
    async def test_t4_an_error_arrives_as_its_class_behind_the_items(self, plane: RequestPlane, code: str) -> None:
        async with self.pair(plane) as (endpoints, _, channel):
            stream = channel.open("fail", code.encode(), Context("it"))
            got, error = await self.to_error(stream)
            assert numbers(got) == [0, 1]
            assert (type(error), str(error)) == (type(errors.from_wire(code, "")), "said on purpose")
            assert type(await self.error_of(stream)) is type(error), "the error stays the error"
            await self.within(endpoints.ended("it"), "the iterator is closed")

    async def test_t4_an_unknown_endpoint_is_endpoint_not_found(self, plane: RequestPlane) -> None:
        async with self.pair(plane) as (_, _, channel):
            assert type(await self.error_of(channel.open("ns.cömponent/x y?.nothing", b"", Context("it")))) is EndpointNotFound

    async def test_t4_an_unexpected_error_is_engine_failed_and_keeps_its_details(self, plane: RequestPlane) -> None:
        async with self.pair(plane) as (_, _, channel):
            error = await self.error_of(channel.open("crash", b"", Context("it")))
            assert type(error) is EngineFailed
            assert "secret" not in str(error)

    async def test_t4_a_handler_that_is_cancelled_from_within_does_not_end_silently(self, plane: RequestPlane) -> None:
        async with self.pair(plane) as (_, _, channel):
            assert isinstance(await self.error_of(channel.open("cancel_itself", b"", Context("it"))), DynamoError)

    # ------------------------------------------------------------------ T5: bad peers

    async def test_t5_garbage_disturbs_nobody(self, plane: RequestPlane) -> None:
        if not self.listens:
            return
        async with self.pair(plane) as (endpoints, server, channel):
            stays = channel.open("wait", b"1", Context("stays"))
            await self.first(stays)
            for garbage in GARBAGE:
                await self.attack(server.address, garbage)
            endpoints.gate.set()
            assert numbers(await self.rest(stays)) == [-1]
            assert numbers(await self.rest(channel.open("count", b"20", Context("after")))) == list(range(20))

    async def attack(self, address: str, garbage: bytes) -> None:
        """Send the garbage as a stranger, and leave."""
        url = urlsplit(address)
        _, writer = await asyncio.open_connection(url.hostname, url.port)
        with contextlib.suppress(OSError):
            writer.write(garbage)
            await writer.drain()
        await asyncio.sleep(0.01)
        writer.transport.abort()

    # ------------------------------------------------------------------ T6: slow readers

    @pytest.mark.parametrize("kind", ["fat", "chunks"])
    async def test_t6_past_the_window_the_handler_is_not_asked_for_more(self, plane: RequestPlane, kind: str) -> None:
        limit = self.held_outputs if kind == "fat" else self.held_bytes // (MiB // 4)
        async with self.pair(plane) as (endpoints, _, channel):
            stream = channel.open(kind, b"%d" % (limit * 100), Context("slow"))
            held = await self.until_still(lambda: endpoints.asked.get("slow", 0))
            assert 0 < held <= limit
            assert numbers(await self.rest(channel.open("count", b"50", Context("other")))) == list(range(50)), "one slow reader holds up another"
            stream.cancel()

    @pytest.mark.parametrize("kind", ["fat", "chunks"])
    async def test_t6_a_reader_that_catches_up_gets_everything(self, plane: RequestPlane, kind: str) -> None:
        n = 2000 if kind == "fat" else 100
        async with self.pair(plane) as (endpoints, _, channel):
            stream = channel.open(kind, b"%d" % n, Context("slow"))
            await self.until_still(lambda: endpoints.asked.get("slow", 0))
            items = await self.rest(stream)
            assert [item.token_ids[0] if isinstance(item, Output) else int.from_bytes(item[:4], "big") for item in items] == list(range(n))

    # ------------------------------------------------------------------ T7: merging

    async def test_t7_a_late_reader_gets_what_has_arrived_in_one_read(self, plane: RequestPlane) -> None:
        async with self.pair(plane) as (endpoints, _, channel):
            stream = channel.open("wait", b"50", Context("it"))
            await self.until_still(lambda: endpoints.asked.get("it", 0))
            assert numbers(await self.first(stream)) == list(range(50))

    # ------------------------------------------------------------------ T8: context

    async def test_t8_the_context_travels(self, plane: RequestPlane) -> None:
        async with self.pair(plane) as (endpoints, _, channel):
            sent = Context("réq 1/%?&", deadline=time.monotonic() + 100, priority=-3, session="sitzung ü\n1", tenant="acme & söhne",
                           traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
            await self.rest(channel.open("count", b"1", sent))
            got = endpoints.contexts[sent.id]
            assert (got.priority, got.session, got.tenant, got.traceparent) == (sent.priority, sent.session, sent.tenant, sent.traceparent)
            remaining = got.remaining()
            assert remaining is not None
            assert 100 - self.guard < remaining <= 100
            assert not got.cancelled

    async def test_t8_an_empty_context_arrives_empty(self, plane: RequestPlane) -> None:
        async with self.pair(plane) as (endpoints, _, channel):
            await self.rest(channel.open("count", b"1", Context("plain")))
            got = endpoints.contexts["plain"]
            assert (got.deadline, got.priority, got.session, got.tenant, got.traceparent) == (None, 0, None, None, None)

    async def test_t8_cancelling_the_worker_s_context_does_not_cancel_the_caller_s(self, plane: RequestPlane) -> None:
        async with self.pair(plane) as (endpoints, _, channel):
            context = Context("it")
            stream = channel.open("wait", b"1", context)
            await self.first(stream)
            endpoints.contexts["it"].cancel("the engine gave up")
            endpoints.gate.set()
            await self.rest(stream)
            assert not context.cancelled
