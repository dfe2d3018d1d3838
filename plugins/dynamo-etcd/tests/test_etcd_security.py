"""Users, passwords and certificates: who belongs gets in, and a stranger neither reads nor registers."""

from __future__ import annotations

import asyncio
import os
import shutil

import pytest

from dynamo_core.config import build
from dynamo_core.config.schema import Use
from dynamo_core.errors import ConfigError, StoreUnavailable
from dynamo_core.plugins import Plugins
from dynamo_core.testing.servers import Authority, ServerTls
from dynamo_etcd.gateway import EtcdTls
from dynamo_etcd.store import EtcdDiscovery


@pytest.fixture(scope="module")
def guarded(etcd_server):
    etcd = etcd_server(password="root's secret")
    etcd.add_user("fleet", "s3cret", "dynamo/")
    return etcd


@pytest.fixture(scope="module")
def mutual(etcd_server, authority):
    cert, key = authority.issue("etcd")
    return etcd_server(tls=ServerTls(authority.cert, cert, key, require_client_cert=True))


async def test_a_user_works_within_its_prefix(guarded, tmp_path) -> None:
    secret = tmp_path / "password"
    secret.write_text("s3cret\n")
    options = {"endpoints": guarded.endpoints, "user": "fleet", "password": f"file:{secret}"}
    store = build(Use("etcd", options), "discovery", Plugins.load())
    assert "s3cret" not in repr(store)
    async with store as here, here.watch("k/") as changes:
        await here.put("k/1", b"one", await here.lease())
        assert await here.items("k/") == {"k/1": b"one"}
        assert await asyncio.wait_for(anext(changes), 20)


async def test_a_token_that_the_server_forgot_is_asked_for_again(guarded) -> None:
    async with EtcdDiscovery(tuple(guarded.endpoints), user="fleet", password="s3cret", ping_interval=60.0) as here:
        await here.put("k/1", b"one")
        guarded.kill()
        await asyncio.to_thread(guarded.start)
        assert await here.get("k/1") == b"one"


@pytest.mark.parametrize(("options", "because"), [
    ({}, "asks who we are"),
    ({"user": "fleet", "password": "wrong"}, "does not let user 'fleet' in"),
    ({"user": "fleet", "password": "s3cret", "prefix": "elsewhere/"}, "may not read keys that begin with 'elsewhere/'"),
])
async def test_a_stranger_is_told_why_it_may_not_in(guarded, options, because) -> None:
    with pytest.raises(ConfigError, match=because):
        async with EtcdDiscovery(tuple(guarded.endpoints), **options):
            pass


async def test_mutual_tls_lets_in_who_shows_a_certificate_of_the_fleet(mutual, authority) -> None:
    cert, key = authority.issue("worker")
    async with EtcdDiscovery(tuple(mutual.endpoints), tls=EtcdTls(authority.cert, cert, key)) as here, here.watch("k/") as changes:
        await here.put("k/1", b"one", await here.lease())
        assert await asyncio.wait_for(anext(changes), 20)


async def test_tls_strangers_neither_read_nor_are_believed(mutual, authority, tmp_path) -> None:
    others = Authority(tmp_path, "others")
    cert, key = others.issue("stranger")
    for tls in (EtcdTls(authority.cert), EtcdTls(authority.cert, cert, key), EtcdTls(others.cert, cert, key)):
        with pytest.raises(StoreUnavailable):
            async with EtcdDiscovery(tuple(mutual.endpoints), tls=tls, timeout=2.0):
                pass


async def test_renewed_certificates_are_used_without_a_restart(mutual, authority, tmp_path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    for new, path in zip(authority.issue("first"), (cert, key), strict=True):
        shutil.copy(new, path)
    async with EtcdDiscovery(tuple(mutual.endpoints), tls=EtcdTls(authority.cert, cert, key), timeout=1.0) as here:
        await here.put("k/1", b"one")
        cert.write_text("not a certificate")
        assert await here.get("k/1") == b"one", "what cannot be used is not used"
        for new, path in zip(authority.issue("second"), (cert, key), strict=True):
            shutil.copy(new, path)
            os.utime(path, (1, 1))
        mutual.kill()
        await asyncio.to_thread(mutual.start)
        assert await here.get("k/1") == b"one"


async def test_missing_certificates_are_a_configuration_error(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"discovery\.tls cannot be used"):
        async with EtcdDiscovery(("https://127.0.0.1:1",), tls=EtcdTls(tmp_path / "none.pem")):
            pass


async def test_an_absent_server_is_named() -> None:
    with pytest.raises(StoreUnavailable, match=r"http://127\.0\.0\.1:9"):
        async with EtcdDiscovery(("http://127.0.0.1:9",), timeout=1.0):
            pass
