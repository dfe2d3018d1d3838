"""Who is calling: the contract of authenticators (kind `authenticator`). Without one everybody may call."""

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
