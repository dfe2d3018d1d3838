"""`authenticator = { use = "jwt", ... }`: who calls is said by a signed token of an identity provider. Needs `dynamo-core[jwt]`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import httpx
import jwt
from attrs import validators as v

from dynamo_core.errors import Unauthorized, Unavailable
from dynamo_core.frontend.contract import Principal, bearer
from dynamo_core.httpx_client import HttpClient

log = logging.getLogger(__name__)

_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "HS256", "HS384", "HS512")
_AGAIN = 10.0
"""Seconds between two attempts to fetch a key set because of tokens whose key it lacks: strangers must not make us hammer the provider."""


def _only_known(_: object, __: object, value: tuple[str, ...]) -> None:
    if not value or any(name not in _ALGORITHMS for name in value):
        raise ValueError(f"'algorithms' must be some of {', '.join(_ALGORITHMS)}: {', '.join(value) or 'none'}")
    if len({name.startswith("HS") for name in value}) > 1:
        raise ValueError("'algorithms' must not mix shared secrets (HS...) with key pairs: a public key could pass for a secret")


@attrs.define(eq=False)
class Jwt:
    """Tokens signed by an identity provider, checked against its key set."""

    issuer: str
    """What `iss` must be."""
    audience: str
    """What `aud` must be or contain."""
    keys: str
    """The key set (JWKS): an `https://` URL, or a path."""
    algorithms: tuple[str, ...] = attrs.field(default=("RS256", "ES256", "EdDSA"), validator=_only_known)
    """How tokens may be signed; anything else is refused, `none` always."""
    tenant_claim: str = "tenant"
    """The claim that names the tenant; a dot leads into an object: `org.id`."""
    admin_claim: str | None = None
    """A claim that is `true` for administrators, who may read `/debug`."""
    leeway: float = attrs.field(default=30.0, validator=v.ge(0), metadata={"duration": True})
    """Seconds by which the clocks of provider and server may differ."""
    refresh: float = attrs.field(default=300.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds after which the key set is fetched again. While that fails, the former one stays in use."""

    _set: dict[str, Any] = attrs.field(init=False, factory=dict, repr=False)
    _fetched: float = attrs.field(init=False, default=float("-inf"), repr=False)
    _tried: float = attrs.field(init=False, default=float("-inf"), repr=False)
    _fetching: asyncio.Lock = attrs.field(init=False, factory=asyncio.Lock, repr=False)

    async def authenticate(self, headers: Mapping[str, str]) -> Principal:
        if not (token := bearer(headers)):
            raise Unauthorized("a token is needed: send it as `Authorization: Bearer TOKEN`")
        try:
            head = jwt.get_unverified_header(token)
            if head.get("alg") not in self.algorithms:
                raise Unauthorized(f"tokens signed with {str(head.get('alg'))[:20]} are not accepted")
            claims: dict[str, Any] = jwt.decode(
                token,
                await self._key(head.get("kid")),
                algorithms=list(self.algorithms),
                issuer=self.issuer,
                audience=self.audience,
                leeway=self.leeway,
                options={"require": ["exp", "iss", "aud"]},
            )
        except (jwt.PyJWTError, UnicodeError) as e:
            raise Unauthorized(f"this token is not valid: {e if isinstance(e, jwt.PyJWTError) else 'it is not ASCII'}") from None
        tenant = _claim(claims, self.tenant_claim)
        if not isinstance(tenant, str) or not tenant:
            raise Unauthorized(f"this token names no tenant (claim {self.tenant_claim!r})")
        subject = claims.get("sub")
        admin = self.admin_claim is not None and _claim(claims, self.admin_claim) is True
        return Principal(tenant[:64], subject[:64] if isinstance(subject, str) else None, admin)

    async def _key(self, kid: str | None) -> Any:
        """:raises Unauthorized: the set has no such key. :raises Unavailable: no set could be had yet."""
        if time.monotonic() - self._fetched > self.refresh or (kid not in self._set and time.monotonic() - self._tried > _AGAIN):
            await self._fetch()
        if (key := self._set.get(kid or "")) is not None:
            return key
        if kid is None and len(self._set) == 1:
            return next(iter(self._set.values()))
        raise Unauthorized("this token was signed by a key that the issuer does not have")

    async def _fetch(self) -> None:
        asked = time.monotonic()
        async with self._fetching:
            if self._tried >= asked:
                return  # somebody else has just done it
            try:
                raw = await self._read()
                found = jwt.PyJWKSet.from_json(raw)
                self._set = {key.key_id or "": key for key in found.keys}
                self._fetched = time.monotonic()
            except (OSError, httpx.HTTPError, jwt.PyJWTError, ValueError) as e:
                log.warning("the key set %s cannot be had: %s", self.keys, e)
                if not self._set:
                    raise Unavailable("tokens cannot be checked now: the issuer's keys are out of reach") from e
                self._fetched = time.monotonic() - self.refresh + min(_AGAIN, self.refresh)
            finally:
                self._tried = time.monotonic()

    async def _read(self) -> str:
        if not self.keys.startswith(("https://", "http://")):
            return await asyncio.to_thread(lambda: Path(self.keys).expanduser().read_text())
        async with HttpClient(timeout=5.0) as client:
            response = await client.get(self.keys)
            response.raise_for_status()
            return response.text


def _claim(claims: Mapping[str, Any], path: str) -> Any:
    found: Any = claims
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found
