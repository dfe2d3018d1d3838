"""The conformance kit of authenticators. Inherit it, provide `authenticator` and `callers`, and run pytest.

    class TestMine(AuthenticatorContract):
        @pytest.fixture
        def authenticator(self): ...

        @pytest.fixture
        def callers(self):
            return {"acme": {"authorization": "Bearer ..."}, "other": {...}}

The guarantees, at length in docs/contracts/authenticator.md: A1 strangers, A2 tenants, A3 near misses, A4 secrecy, A5 many at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping

import pytest

from dynamo_core.errors import Unauthorized
from dynamo_core.frontend.contract import Authenticator, Principal

Callers = Mapping[str, Mapping[str, str]]


class AuthenticatorContract:
    """`authenticator` is ready to be asked; `callers` are the headers of one valid caller each, by tenant: two at least."""

    @pytest.mark.parametrize(
        "headers", [{}, {"authorization": ""}, {"authorization": "Bearer"}, {"authorization": "Bearer "}, {"authorization": "Basic YTpi"}], ids=str
    )
    async def test_a1_no_credential_is_refused(self, authenticator: Authenticator, headers: Mapping[str, str]) -> None:
        with pytest.raises(Unauthorized):
            await authenticator.authenticate(headers)

    async def test_a2_a_credential_names_its_tenant(self, authenticator: Authenticator, callers: Callers) -> None:
        for tenant, headers in callers.items():
            assert (await authenticator.authenticate(headers)).tenant == tenant

    async def test_a2_other_headers_claim_nothing(self, authenticator: Authenticator, callers: Callers) -> None:
        claims = {"x-tenant-id": "somebody-else", "x-forwarded-user": "root", "x-admin": "true"}
        for tenant, headers in callers.items():
            told, plain = await authenticator.authenticate({**claims, **headers}), await authenticator.authenticate(headers)
            assert (told.tenant, told.admin) == (tenant, plain.admin)

    async def test_a3_what_is_close_to_a_credential_is_refused(self, authenticator: Authenticator, callers: Callers) -> None:
        for headers in callers.values():
            for close in _near_misses(headers["authorization"]):
                with pytest.raises(Unauthorized):  # noqa: PT012
                    await authenticator.authenticate({**headers, "authorization": close})
                    pytest.fail(f"accepted a changed credential: {close[:12]}...{close[-6:]} ({len(close)} characters)")

    @pytest.mark.parametrize("text", ["\x00", "é" * 50, "a" * 100_000, "..", "a.b.c", "%s%n", "' or 1=1 --", "\ud800"], ids=range(8))
    async def test_a3_any_text_is_answered(self, authenticator: Authenticator, text: str) -> None:
        with pytest.raises(Unauthorized):
            await authenticator.authenticate({"authorization": f"Bearer {text}"})

    async def test_a4_no_credential_is_repeated(self, authenticator: Authenticator, callers: Callers, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.DEBUG):
            for headers in callers.values():
                secret = headers["authorization"].removeprefix("Bearer ")
                assert secret not in repr(await authenticator.authenticate(headers)), "the principal holds the credential"
                wrong = secret[:-4] + ("AAAA" if secret[-4:] != "AAAA" else "BBBB")
                with pytest.raises(Unauthorized) as refused:
                    await authenticator.authenticate({"authorization": f"Bearer {wrong}"})
                assert wrong not in str(refused.value), "the error repeats the credential"
                assert wrong not in caplog.text, "the log has a credential"
                assert secret not in caplog.text, "the log has a credential"

    async def test_a5_many_at_once_get_their_own_answers(self, authenticator: Authenticator, callers: Callers) -> None:
        asked = [*callers.items()] * 50
        answers = await asyncio.gather(*(authenticator.authenticate(headers) for _, headers in asked))
        assert [answer.tenant for answer in answers] == [tenant for tenant, _ in asked]
        assert all(isinstance(answer, Principal) for answer in answers)


def _near_misses(credential: str) -> Iterator[str]:
    scheme, _, secret = credential.partition(" ")
    yield f"{scheme} {secret[:-1]}"
    yield f"{scheme} {secret}x"
    yield f"{scheme} {secret}{secret}"
    yield f"{scheme} {secret.swapcase()}"
    yield f"Basic {secret}"
    for at in (len(secret) // 4, len(secret) // 2, 3 * len(secret) // 4):
        yield f"{scheme} {secret[:at]}{'A' if secret[at] != 'A' else 'B'}{secret[at + 1 :]}"
