"""Tokens of an identity provider: a real key set over real HTTP, and everything that must not pass."""

from __future__ import annotations

import asyncio
import base64
import json
import time

import jwt as pyjwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from dynamo_core.contracts import AuthenticatorContract
from dynamo_core.errors import Unauthorized, Unavailable
from dynamo_core.frontend.jwt import Jwt

ISSUER, AUDIENCE = "https://id.test/", "dynamo"
KEYS = {"k1": ec.generate_private_key(ec.SECP256R1()), "k2": ec.generate_private_key(ec.SECP256R1())}
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def jwks(*names):
    listed = [json.loads(pyjwt.algorithms.ECAlgorithm.to_jwk(KEYS[name].public_key())) | {"kid": name, "alg": "ES256"} for name in names]
    return json.dumps({"keys": listed})


def token(kid="k1", *, key=None, algorithm="ES256", tenant="acme", headers=None, **claims):
    body = {"iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 60, "sub": "ann", "org": {"id": tenant}, **claims}
    body = {name: value for name, value in body.items() if value is not None}
    return pyjwt.encode(body, key or KEYS[kid], algorithm, headers={"kid": kid, **(headers or {})})


def bearer(text):
    return {"authorization": f"Bearer {text}"}


@pytest.fixture
def authenticator(tmp_path):
    path = tmp_path / "jwks.json"
    path.write_text(jwks("k1"))
    return Jwt(ISSUER, AUDIENCE, str(path), tenant_claim="org.id", admin_claim="admin")


class TestJwt(AuthenticatorContract):
    @pytest.fixture
    def authenticator(self, authenticator):
        return authenticator

    @pytest.fixture
    def callers(self):
        return {tenant: bearer(token(tenant=tenant)) for tenant in ("acme", "other")}


async def test_a_token_names_tenant_subject_and_administrator(authenticator):
    principal = await authenticator.authenticate(bearer(token(admin=True)))
    assert (principal.tenant, principal.subject, principal.admin) == ("acme", "ann", True)
    assert not (await authenticator.authenticate(bearer(token(admin="true")))).admin


@pytest.mark.parametrize(
    "claims",
    [{"iss": "https://evil.test/"}, {"aud": "another"}, {"exp": 1}, {"exp": None}, {"aud": None}, {"iss": None}, {"nbf": 9_999_999_999}, {"org": {}}, {"org": "acme"}, {"org": {"id": 7}}],
    ids=str,
)
async def test_a_token_for_somebody_else_or_another_time_is_refused(authenticator, claims):
    with pytest.raises(Unauthorized):
        await authenticator.authenticate(bearer(token(**claims)))


async def test_algorithms_that_are_not_allowed_are_refused(authenticator):
    public = KEYS["k1"].public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    part = lambda data: base64.urlsafe_b64encode(json.dumps(data).encode()).rstrip(b"=").decode()
    claims = {"iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 60, "org": {"id": "acme"}}
    unsigned = f"{part({'alg': 'none', 'kid': 'k1'})}.{part(claims)}."
    import hashlib
    import hmac

    signed = f"{part({'alg': 'HS256', 'kid': 'k1'})}.{part(claims)}"
    confused = f"{signed}.{base64.urlsafe_b64encode(hmac.digest(public, signed.encode(), hashlib.sha256)).rstrip(b'=').decode()}"
    for wrong in (unsigned, confused, token(key=RSA, algorithm="RS256"), token(key=KEYS["k2"])):
        with pytest.raises(Unauthorized):
            await authenticator.authenticate(bearer(wrong))


def test_shared_secrets_are_not_mixed_with_key_pairs():
    with pytest.raises(ValueError, match="must not mix"):
        Jwt(ISSUER, AUDIENCE, "x", algorithms=("HS256", "RS256"))
    with pytest.raises(ValueError, match="must be some of"):
        Jwt(ISSUER, AUDIENCE, "x", algorithms=("none",))


class Provider:
    """Serves a key set, and counts."""

    def __init__(self):
        self.content, self.asked, self.up = jwks("k1"), 0, True

    async def answer(self, reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        self.asked += 1
        status = "200 OK" if self.up else "503 Unavailable"
        writer.write(f"HTTP/1.1 {status}\r\ncontent-length: {len(self.content)}\r\nconnection: close\r\n\r\n{self.content}".encode())
        await writer.drain()
        writer.close()


@pytest.fixture
async def provider():
    provider = Provider()
    server = await asyncio.start_server(provider.answer, "127.0.0.1", 0)
    provider.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks"
    yield provider
    server.close()


async def test_the_key_set_is_fetched_once_and_again_for_a_new_key(provider, monkeypatch):
    authenticator = Jwt(ISSUER, AUDIENCE, provider.url, tenant_claim="org.id")
    await asyncio.gather(*(authenticator.authenticate(bearer(token())) for _ in range(20)))
    assert provider.asked == 1
    provider.content = jwks("k1", "k2")
    for _ in range(20):
        with pytest.raises(Unauthorized):
            await authenticator.authenticate(bearer(token("k2")))
    assert provider.asked == 1, "tokens with unknown keys must not make us hammer the provider"
    monkeypatch.setattr("dynamo_core.frontend.jwt._AGAIN", 0.0)
    assert (await authenticator.authenticate(bearer(token("k2")))).tenant == "acme"
    assert provider.asked == 2


async def test_a_provider_that_is_away_takes_nothing_from_known_keys(provider):
    authenticator = Jwt(ISSUER, AUDIENCE, provider.url, tenant_claim="org.id", refresh=0.01)
    provider.up = False
    with pytest.raises(Unavailable):
        await authenticator.authenticate(bearer(token()))
    provider.up = True
    await authenticator.authenticate(bearer(token()))
    provider.up = False
    await asyncio.sleep(0.02)
    assert (await authenticator.authenticate(bearer(token()))).tenant == "acme"
