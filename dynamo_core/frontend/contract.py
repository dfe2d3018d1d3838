"""Who may call, and how much: the contracts of authenticators and rate limiters. Without them everybody may, without limit.

An authenticator promises (docs/contracts/authenticator.md):

    A1  no credential, or one that is not valid: `Unauthorized`, and nothing else is said
    A2  a valid credential names its tenant, whatever other headers claim
    A3  a text that is merely close to a valid credential is refused, whatever its length or characters
    A4  no credential stands in an error, a principal or the log
    A5  many callers at once get their own answers

A rate limiter promises (docs/contracts/rate-limiter.md):

    L1  requests over the limit of their tenant are refused with the time after which they would be taken
    L2  tokens are reserved before a request runs; what it did not use is given back, and what it used more is charged
    L3  one tenant's use never takes from another's
    L4  many requests at once never get more than the limit
    L5  a reservation that could never be had is refused for good
    L6  a refused reservation costs nothing
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import attrs


@attrs.frozen
class Principal:
    """On whose behalf a request runs."""

    tenant: str | None = None
    """Beats the `x-tenant-id` header, which anybody can write."""
    subject: str | None = None
    """For the access log; never a credential."""
    admin: bool = False
    """May read `/debug`, where other tenants' requests are seen."""


@runtime_checkable
class Authenticator(Protocol):
    """Called once for each completion and model-listing request, before its body is read. Health and metrics stay open."""

    async def authenticate(self, headers: Mapping[str, str]) -> Principal:
        """:param headers: names in lower case. :raises Unauthorized: with a text for the client, without the credential."""
        ...


@runtime_checkable
class Reservation(Protocol):
    """Tokens that a request in progress may use."""

    def settle(self, tokens: int) -> None:
        """The request is over, however it ended, and used so many. Called exactly once; must not block."""
        ...


@runtime_checkable
class RateLimiter(Protocol):
    """Asked twice for each completion request. Nothing of a refused request is routed or generated.

    One that is an async context manager is entered before the first request and left after the last. One that is `TellsProblem` is asked by `/health`.
    """

    async def admit(self, tenant: str | None) -> None:
        """Count one request, before its body is read. `None`: nobody vouches for a tenant; all such callers share one account.

        :raises RateLimited: with `retry_after`.
        """
        ...

    async def reserve(self, tenant: str | None, tokens: int) -> Reservation:
        """Take the tokens of the prompt and of the longest answer that may come.

        :raises RateLimited: not now; with `retry_after`. :raises QuotaExceeded: never, it is more than the whole limit.
        """
        ...


@runtime_checkable
class TellsProblem(Protocol):
    """A limiter that may be less than itself: one that counts alone while its store is away, say."""

    def problem(self) -> str | None:
        """A sentence for `/health`, which then says `degraded`; `None`: all is well."""
        ...


def bearer(headers: Mapping[str, str]) -> str:
    """The credential of `Authorization: Bearer ...`, or of `x-api-key`; empty when there is none."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
