"""TLS and mutual TLS on both network planes, with certificates made on the spot."""

import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dynamo_core.context import Context
from dynamo_core.errors import CannotConnect, ConfigError
from dynamo_core.testing.servers import Authority
from dynamo_core.transport.contract import Item
from dynamo_core.transport.http import HttpPlane
from dynamo_core.transport.tcp import TcpPlane
from dynamo_core.transport.tls import PlaneTls
from dynamo_core.types import Output


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "fleet")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "strangers")


@pytest.fixture(scope="module")
def worker(fleet: Authority) -> tuple[Path, Path]:
    return fleet.issue("worker", "IP:127.0.0.1,DNS:worker.fleet")


async def echo(endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
    yield Output([1])
    yield payload


async def call(plane: TcpPlane | HttpPlane, address: str) -> list[Item]:
    channel = await plane.connect(address)
    try:
        stream = channel.open("echo", bytes(300_000), Context("q"))
        got: list[Item] = []
        while items := await stream.read():
            got += items
        return got
    finally:
        await channel.close()


@contextlib.asynccontextmanager
async def serving(plane: TcpPlane | HttpPlane) -> AsyncIterator[str]:
    server = await plane.serve(echo, "127.0.0.1")
    try:
        yield server.address
    finally:
        await server.close()


@pytest.fixture(params=[TcpPlane, HttpPlane])
def make(request: pytest.FixtureRequest) -> type[TcpPlane] | type[HttpPlane]:
    return request.param


Make = type[TcpPlane] | type[HttpPlane]


async def test_streams_travel_encrypted_with_one_configuration_for_both_sides(make: Make, fleet: Authority, worker: tuple[Path, Path]) -> None:
    plane = make(tls=PlaneTls(fleet.cert, *worker, require_client_cert=True))
    async with serving(plane) as address:
        assert await call(plane, address) == [Output([1]), bytes(300_000)]


async def test_a_worker_that_strangers_signed_is_refused(make: Make, strangers: Authority, worker: tuple[Path, Path], fleet: Authority) -> None:
    async with serving(make(tls=PlaneTls(fleet.cert, *worker))) as address:
        with pytest.raises(CannotConnect, match=r"(?i)certificate"):
            await call(make(tls=PlaneTls(strangers.cert)), address)


async def test_a_caller_without_a_certificate_is_refused_where_one_is_required(make: Make, fleet: Authority, worker: tuple[Path, Path]) -> None:
    async with serving(make(tls=PlaneTls(fleet.cert, *worker, require_client_cert=True))) as address:
        with pytest.raises(CannotConnect):
            await call(make(tls=PlaneTls(fleet.cert)), address)


async def test_a_caller_that_strangers_signed_is_refused(make: Make, fleet: Authority, strangers: Authority, worker: tuple[Path, Path]) -> None:
    async with serving(make(tls=PlaneTls(fleet.cert, *worker, require_client_cert=True))) as address:
        with pytest.raises(CannotConnect):
            await call(make(tls=PlaneTls(fleet.cert, *strangers.issue("caller", "DNS:caller"))), address)


async def test_the_name_in_the_certificate_is_checked_and_can_be_configured(make: Make, fleet: Authority) -> None:
    named = fleet.issue("named", "DNS:worker.fleet")
    async with serving(make(tls=PlaneTls(fleet.cert, *named))) as address:
        with pytest.raises(CannotConnect, match=r"127\.0\.0\.1"):
            await call(make(tls=PlaneTls(fleet.cert)), address)
        assert await call(make(tls=PlaneTls(fleet.cert, server_name="worker.fleet")), address)


async def test_renewed_certificates_are_used_from_the_next_connection_on(make: Make, fleet: Authority, strangers: Authority, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def install(pair: tuple[Path, Path]) -> None:
        for source, target in zip(pair, (cert, key), strict=True):
            target.write_bytes(source.read_bytes())
            os.utime(target, (time.time(), time.time() + install.calls))
        install.calls += 1

    install.calls = 1  # type: ignore[attr-defined]
    install(fleet.issue("first", "IP:127.0.0.1"))
    async with serving(make(tls=PlaneTls(fleet.cert, cert, key))) as address:
        trusting_fleet, trusting_strangers = make(tls=PlaneTls(fleet.cert)), make(tls=PlaneTls(strangers.cert))
        assert await call(trusting_fleet, address)
        install(strangers.issue("second", "IP:127.0.0.1"))
        assert await call(trusting_strangers, address)
        with pytest.raises(CannotConnect):
            await call(trusting_fleet, address)
        key.write_text("half written")
        assert await call(trusting_strangers, address), "the old certificate stays while the new one cannot be used"


async def test_plain_callers_of_an_encrypted_worker_and_the_reverse_get_a_clear_error(make: Make, fleet: Authority, worker: tuple[Path, Path]) -> None:
    tls = PlaneTls(fleet.cert, *worker)
    async with serving(make(tls=tls)) as address:
        with pytest.raises(CannotConnect):
            await call(make(), address)
    async with serving(make()) as address:
        with pytest.raises(CannotConnect):
            await call(make(tls=tls), address)


async def test_files_that_cannot_be_used_are_named(make: Make, fleet: Authority, worker: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.pem"):
        await make(tls=PlaneTls(fleet.cert, tmp_path / "absent.pem", worker[1])).serve(echo, "127.0.0.1")
    with pytest.raises(ConfigError, match="`cert` and `key`"):
        await make(tls=PlaneTls(fleet.cert)).serve(echo, "127.0.0.1")
    with pytest.raises(ConfigError, match="belong together"):
        await make(tls=PlaneTls(fleet.cert, worker[0])).serve(echo, "127.0.0.1")
