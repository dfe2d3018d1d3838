"""Authenticators that break one guarantee each: the kit rejects every one."""

from __future__ import annotations

import asyncio
import hmac
import inspect
import logging

import pytest

from dynamo_core.contracts.authenticator import AuthenticatorContract
from dynamo_core.errors import Unauthorized
from dynamo_core.frontend.contract import Principal

KEYS = {"sk-" + "a1B2c3D4" * 4: "acme", "sk-" + "z9Y8x7W6" * 4: "other"}
CALLERS = {tenant: {"authorization": f"Bearer {key}"} for key, tenant in KEYS.items()}


class Honest:
    async def authenticate(self, headers):
        return Principal(self.tenant(self.credential(headers), headers))

    def credential(self, headers):
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme != "Bearer":
            raise Unauthorized("send a key")
        return key

    def tenant(self, key, headers):
        for known, tenant in KEYS.items():
            if hmac.compare_digest(known.encode(), key.encode("utf-8", "replace")):
                return tenant
        raise Unauthorized("this key is not valid")


class LetsAnonymousIn(Honest):
    async def authenticate(self, headers):
        return Principal("anonymous") if "authorization" not in headers else await super().authenticate(headers)


class BelievesTheHeader(Honest):
    def tenant(self, key, headers):
        tenant = super().tenant(key, headers)
        return headers.get("x-tenant-id", tenant)


class ComparesAPrefix(Honest):
    def tenant(self, key, headers):
        return super().tenant(next((known for known in KEYS if key and known.startswith(key[:8])), key), headers)


class IgnoresCase(Honest):
    def tenant(self, key, headers):
        return super().tenant(next((known for known in KEYS if known.lower() == key.lower()), key), headers)


class TakesAnyScheme(Honest):
    def credential(self, headers):
        if not headers.get("authorization", "").partition(" ")[2]:
            raise Unauthorized("send a key")
        return headers["authorization"].partition(" ")[2]


class RepeatsTheKey(Honest):
    def tenant(self, key, headers):
        try:
            return super().tenant(key, headers)
        except Unauthorized:
            raise Unauthorized(f"the key {key} is not valid") from None


class LogsTheKey(Honest):
    def tenant(self, key, headers):
        logging.getLogger("auth").debug("checking %s", key)
        return super().tenant(key, headers)


class PrincipalIsTheKey(Honest):
    async def authenticate(self, headers):
        return Principal((await super().authenticate(headers)).tenant, subject=headers["authorization"].partition(" ")[2])


class BreaksOnOddText(Honest):
    def credential(self, headers):
        key = super().credential(headers)
        key.encode("ascii")
        return key


class SharesOneAnswer(Honest):
    last = None

    async def authenticate(self, headers):
        SharesOneAnswer.last = await super().authenticate(headers)
        await asyncio.sleep(0)
        return SharesOneAnswer.last


FAULTS = [
    (LetsAnonymousIn, "a1"), (BelievesTheHeader, "a2"), (ComparesAPrefix, "a3"), (IgnoresCase, "a3"), (TakesAnyScheme, "a3"), (BreaksOnOddText, "a3"),
    (RepeatsTheKey, "a4"), (LogsTheKey, "a4"), (PrincipalIsTheKey, "a4"), (SharesOneAnswer, "a5"),
]


class TestHonest(AuthenticatorContract):
    @pytest.fixture
    def authenticator(self):
        return Honest()

    @pytest.fixture
    def callers(self):
        return CALLERS


async def finds(authenticator, guarantee, caplog) -> bool:
    """Whether some test of this guarantee fails."""
    for name, test in inspect.getmembers(AuthenticatorContract, inspect.isfunction):
        if not name.startswith(f"test_{guarantee}_"):
            continue
        given = {"authenticator": authenticator, "callers": CALLERS, "caplog": caplog}
        marks = [mark.args for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
        for values in [{marks[0][0]: value} for value in marks[0][1]] if marks else [{}]:
            wanted = inspect.signature(test).parameters.keys() - {"self"}
            try:
                await test(AuthenticatorContract(), **{k: v for k, v in (given | values).items() if k in wanted})
            except (Exception, pytest.fail.Exception):
                return True
    return False


@pytest.mark.parametrize(("fault", "guarantee"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
async def test_the_kit_finds(fault, guarantee, caplog):
    assert await finds(fault(), guarantee, caplog)
