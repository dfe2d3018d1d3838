"""Users, tokens, nkeys, credentials and certificates: who belongs gets in, and a stranger neither hears nor speaks."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import time

import nkeys
import pytest

from dynamo_core.config import build
from dynamo_core.config.schema import Use
from dynamo_core.context import Context
from dynamo_core.errors import CannotConnect, ConfigError
from dynamo_core.plugins import Plugins
from dynamo_core.testing.servers import Authority, ServerTls
from dynamo_nats.connection import NatsTls
from dynamo_nats.events import NatsEvents
from dynamo_nats.plane import NatsPlane


async def serves(plane: NatsPlane, counting, read_all) -> None:
    server = await plane.serve(counting, "")
    channel = await plane.connect(server.address)
    assert await read_all(channel.open("count", b"5", Context("s"))) == list(range(5))
    await channel.close()
    await server.close()


def key_pair(kind: int) -> tuple[nkeys.KeyPair, str]:
    """A new key pair of this kind (a prefix byte of nkeys), and its seed."""
    import secrets

    seed = nkeys.encode_seed(secrets.token_bytes(32), kind).decode()
    return nkeys.from_seed(bytearray(seed.encode())), seed


@pytest.fixture(scope="module")
def with_users(nats_server):
    rights = 'permissions { publish: ["dynamo.>", "$JS.API.>"], subscribe: ["dynamo.>", "_INBOX.>"] }'
    return nats_server(more=f'authorization {{ users: [ {{ user: fleet, password: s3cret, {rights} }}, {{ user: other, password: s3cret, permissions '
                            '{ publish: ["other.>"], subscribe: ["other.>"] } } ] }')


async def test_a_user_gets_in_and_needs_no_rights_beyond_the_prefix(with_users, counting, read_all, tmp_path, member, discovery) -> None:
    secret = tmp_path / "password"
    secret.write_text("s3cret\n")
    options = {"servers": with_users.servers, "user": "fleet", "password": f"file:{secret}"}
    plane = build(Use("nats", options), "request_plane", Plugins.load())
    assert "s3cret" not in repr(plane)
    await serves(plane, counting, read_all)
    for durable in (False, True):
        events = build(Use("nats", {**options, "durable": durable}), "event_plane", Plugins.load())
        async with member(events, discovery):
            publisher, subscription = await events.publisher("t"), await events.subscribe("t")
            publisher.publish(b"hello")
            assert (await asyncio.wait_for(anext(aiter(subscription)), 20)).payload == b"hello"


@pytest.mark.parametrize("options", [{}, {"user": "fleet", "password": "wrong"}, {"token": "s3cret"}])
async def test_a_stranger_is_refused_at_once(with_users, counting, member, discovery, options) -> None:
    plane = NatsPlane(servers=tuple(with_users.servers), connect_timeout=10.0, **options)
    started = time.monotonic()
    with pytest.raises(ConfigError, match="does not let us in"):
        await plane.serve(counting, "")
    with pytest.raises(CannotConnect, match="does not let us in"):
        await plane.connect("nats://dynamo.rpc.x.y")
    with pytest.raises(ConfigError, match="does not let us in"):
        async with member(NatsEvents(servers=tuple(with_users.servers), connect_timeout=10.0, **options), discovery):
            pass
    assert time.monotonic() - started < 10


async def test_a_user_of_another_prefix_hears_and_reaches_nobody(with_users, counting) -> None:
    servers = tuple(with_users.servers)
    mine = NatsPlane(servers=servers, user="fleet", password="s3cret")
    server = await mine.serve(counting, "")
    stranger = NatsPlane(servers=servers, user="other", password="s3cret", prefix="other", connect_timeout=1.0)
    with pytest.raises(CannotConnect):
        await stranger.connect(server.address)
    assert counting.serving == 0
    await server.close()


async def test_a_token_gets_in(nats_server, counting, read_all) -> None:
    nats = nats_server(more="authorization { token: s3cret }")
    await serves(NatsPlane(servers=tuple(nats.servers), token="s3cret"), counting, read_all)


async def test_an_nkey_gets_in(nats_server, counting, read_all) -> None:
    pair, seed = key_pair(nkeys.PREFIX_BYTE_USER)
    _, stranger = key_pair(nkeys.PREFIX_BYTE_USER)
    nats = nats_server(more=f"authorization {{ users: [ {{ nkey: {pair.public_key.decode()} }} ] }}")
    await serves(NatsPlane(servers=tuple(nats.servers), nkey_seed=seed), counting, read_all)
    with pytest.raises(ConfigError, match="does not let us in"):
        await NatsPlane(servers=tuple(nats.servers), nkey_seed=stranger).serve(counting, "")


async def test_a_credentials_file_gets_in(nats_server, counting, read_all, tmp_path) -> None:
    operator, _ = key_pair(nkeys.PREFIX_BYTE_OPERATOR)
    account, _ = key_pair(nkeys.PREFIX_BYTE_ACCOUNT)
    user, seed = key_pair(nkeys.PREFIX_BYTE_USER)
    forever = {"subs": -1, "data": -1, "payload": -1}
    limits = {**forever, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
    of_operator = jwt(operator, operator, {"type": "operator", "version": 2})
    of_account = jwt(operator, account, {"type": "account", "version": 2, "limits": limits})
    of_user = jwt(account, user, {"type": "user", "version": 2, **forever})
    public = account.public_key.decode()
    nats = nats_server(jetstream=False, more=f"operator: {of_operator}\nresolver: MEMORY\nresolver_preload: {{ {public}: {of_account} }}")
    creds = tmp_path / "user.creds"
    creds.write_text(f"-----BEGIN NATS USER JWT-----\n{of_user}\n------END NATS USER JWT------\n\n"
                     f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n")
    await serves(NatsPlane(servers=tuple(nats.servers), creds=creds), counting, read_all)
    with pytest.raises(ConfigError, match="does not let us in"):
        await NatsPlane(servers=tuple(nats.servers)).serve(counting, "")


def jwt(issuer: nkeys.KeyPair, subject: nkeys.KeyPair, claims: dict) -> str:
    """A token as NATS wants it, signed by an nkey."""

    def encoded(part: bytes) -> str:
        return base64.urlsafe_b64encode(part).decode().rstrip("=")

    body = {"iss": issuer.public_key.decode(), "sub": subject.public_key.decode(), "iat": int(time.time()), "jti": "x", "name": "x", "nats": claims}
    signed = f"{encoded(json.dumps({'typ': 'JWT', 'alg': 'ed25519-nkey'}).encode())}.{encoded(json.dumps(body).encode())}"
    return f"{signed}.{encoded(issuer.sign(signed.encode()))}"


async def test_mutual_tls_lets_in_who_shows_a_certificate_of_the_fleet(nats_server, authority, counting, read_all, tmp_path) -> None:
    cert, key = authority.issue("nats")
    nats = nats_server(tls=ServerTls(authority.cert, cert, key, require_client_cert=True))
    mine, my_key = authority.issue("worker")
    await serves(NatsPlane(servers=tuple(nats.servers), tls=NatsTls(authority.cert, mine, my_key)), counting, read_all)
    others = Authority(tmp_path, "others")
    cert, key = others.issue("stranger")
    for tls in (None, NatsTls(authority.cert), NatsTls(authority.cert, cert, key), NatsTls(others.cert, mine, my_key)):
        with pytest.raises(CannotConnect):
            await NatsPlane(servers=tuple(nats.servers), tls=tls, connect_timeout=0.5).connect("nats://dynamo.rpc.x.y")


async def test_garbage_on_our_subjects_disturbs_nobody(nats_server, counting, read_all) -> None:
    import random

    import nats as client

    from dynamo_core.contracts.transport_endpoints import GARBAGE
    from dynamo_nats.link import HEADER

    nats = nats_server()
    plane = NatsPlane(servers=tuple(nats.servers))
    server = await plane.serve(counting, "")
    channel = await plane.connect(server.address)
    stream = channel.open("paced", b"60", Context("s"))
    stranger = await client.connect(nats.servers[0])
    dice = random.Random(1)
    inbox = stranger.new_inbox()
    assert plane._port is not None
    for subject in (server.address.removeprefix("nats://"), f"{plane._port._subject}.unknown"):
        for garbage in (*GARBAGE, *(HEADER.pack(kind, dice.getrandbits(63), dice.getrandbits(63)) + dice.randbytes(100) for kind in range(9))):
            await stranger.publish(subject, garbage, inbox)
            await stranger.publish(subject, garbage)
    await stranger.close()
    assert await read_all(stream) == list(range(60))
    await channel.close()
    await server.close()


async def test_renewed_certificates_are_shown_and_believed_without_a_restart(nats_server, authority, counting, read_all, tmp_path) -> None:
    """Of this process and of the servers, and the authority as well: whoever renews it leaves both in the file for a while."""
    folder = tmp_path / "tls"
    folder.mkdir()
    files = ca, cert, key, server_cert, server_key = [folder / name for name in ("ca.pem", "cert.pem", "key.pem", "server.pem", "server.key")]

    def renew(name: str, signer: Authority, *more: Authority) -> None:
        ca.write_bytes(b"".join(one.cert.read_bytes() for one in (signer, *more)))
        for new, path in zip((*signer.issue(name), *signer.issue(f"nats-{name}")), files[1:], strict=True):
            shutil.copy(new, path)

    renew("first", authority)
    nats = nats_server(tls=ServerTls(ca, server_cert, server_key, require_client_cert=True))
    plane = NatsPlane(servers=tuple(nats.servers), tls=NatsTls(ca, cert, key), lost_after=10.0)
    server = await plane.serve(counting, "")
    channel = await plane.connect(server.address)
    stream = channel.open("paced", b"300", Context("s"))
    assert await asyncio.to_thread(nats.certificates, "dynamo") == ["first"]
    renew("second", Authority(tmp_path, "next"), authority)
    await asyncio.to_thread(nats.reload)
    nats.kill()
    await asyncio.to_thread(nats.start)
    assert await read_all(stream) == list(range(300))
    assert await asyncio.to_thread(nats.certificates, "dynamo") == ["second"]
    await channel.close()
    await server.close()
