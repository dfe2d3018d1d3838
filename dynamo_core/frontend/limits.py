"""`rate_limiter = { use = "per-tenant", ... }`: token buckets in the memory of this process, one for each tenant and limit."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Mapping

import attrs

from dynamo_core.errors import QuotaExceeded, RateLimited

_RATE = re.compile(r"\s*(\d+)\s*(?:/|per)\s*(?:(\d+)\s*)?(second|minute|hour|day)s?\s*")
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
TENANTS = 100_000
"""Accounts that are kept. The one unused for longest goes first; it starts again full, as it would be by then."""


def valid_rates(_: object, attribute: attrs.Attribute[str | None], value: str | None) -> None:
    """For fields of options that hold limits."""
    try:
        rates(value)
    except ValueError as e:
        raise ValueError(f"'{attribute.name}' {e}") from None


def rates(text: str | None) -> tuple[tuple[int, float], ...]:
    """`"10/second; 300/minute"` as (amount, seconds) of each. :raises ValueError: says what can be written."""
    found: list[tuple[int, float]] = []
    for part in (text or "").split(";"):
        if not part.strip():
            continue
        matched = _RATE.fullmatch(part)
        if matched is None or not int(matched[1]) or matched[2] == "0":
            raise ValueError(f'must be limits such as "600/minute" or "10/second; 300/minute": {part.strip()!r}')
        found.append((int(matched[1]), float(int(matched[2] or 1) * _SECONDS[matched[3]])))
    return tuple(found)


@attrs.frozen
class Limits:
    """Of one tenant. What is left out is as for everybody."""

    requests: str | None = attrs.field(default=None, validator=valid_rates)
    """Such as `"600/minute"`, or several: `"10/second; 300/minute"`; empty: no limit."""
    tokens: str | None = attrs.field(default=None, validator=valid_rates)
    """Prompt and answer together."""


class Bucket:
    """Fills at a steady rate up to `amount`. The clock is monotonic: wall clocks and their jumps decide nothing."""

    __slots__ = ("_level", "_rate", "_seen", "amount", "seconds")

    def __init__(self, amount: int, seconds: float, now: float) -> None:
        self.amount, self.seconds = amount, seconds
        self._rate = amount / seconds
        self._level, self._seen = float(amount), now

    def level(self, now: float) -> float:
        """What it holds. A time before the last one changes nothing."""
        if now > self._seen:
            self._level = min(float(self.amount), self._level + (now - self._seen) * self._rate)
            self._seen = now
        return self._level

    def set(self, level: float, now: float) -> None:
        """It held so much at that time, as somebody else knows."""
        self._level, self._seen = min(float(self.amount), level), now

    def wait(self, cost: float, now: float) -> float:
        """Seconds until it holds `cost`; 0 when it does now."""
        self.level(now)
        return max(0.0, (cost - self._level) / self._rate)

    def take(self, cost: float) -> None:
        """May leave it below zero: what was used is used, and waits are longer then. A negative cost gives back."""
        self._level = min(float(self.amount), self._level - cost)

    def __str__(self) -> str:
        unit = next(unit for unit in ("day", "hour", "minute", "second") if self.seconds % _SECONDS[unit] == 0)
        count = int(self.seconds / _SECONDS[unit])
        return f"{self.amount} per {f'{count} {unit}s' if count > 1 else unit}"


class Account:
    """What one tenant has left, of requests and of tokens."""

    __slots__ = ("requests", "tokens")

    def __init__(self, everybody: Limits, own: Limits | None, now: float) -> None:
        """:param own: of this tenant; what it leaves out is as for everybody."""
        requests, tokens = (everybody, everybody) if own is None else (everybody if own.requests is None else own, everybody if own.tokens is None else own)
        self.requests = [Bucket(*rate, now) for rate in rates(requests.requests)]
        self.tokens = [Bucket(*rate, now) for rate in rates(tokens.tokens)]

    def admit(self, now: float) -> None:
        """Take one request. :raises RateLimited: there is none left now."""
        if (short := _short(self.requests, 1, now)) is not None:
            wait, bucket = short
            raise RateLimited(f"too many requests: the limit is {bucket}; try again in {wait:.1f} s", retry_after=wait)
        for bucket in self.requests:
            bucket.take(1)

    def reserve(self, tokens: int, now: float) -> None:
        """Take so many. :raises RateLimited: they are not there now. :raises QuotaExceeded: they never will be."""
        for bucket in self.tokens:
            if tokens > bucket.amount:
                raise QuotaExceeded(
                    f"this request may use {tokens} tokens, prompt and answer together, and the limit is {bucket}; lower max_tokens or shorten the prompt"
                )
        if (short := _short(self.tokens, tokens, now)) is not None:
            wait, bucket = short
            raise RateLimited(f"too many tokens: this request may use {tokens} and the limit is {bucket}; try again in {wait:.1f} s", retry_after=wait)
        self.charge(tokens)

    def charge(self, tokens: int) -> None:
        """Used is used, also what is not there. Below zero: give back."""
        for bucket in self.tokens:
            bucket.take(tokens)


class _Held:
    """A reservation of tokens."""

    __slots__ = ("_account", "_tokens")

    def __init__(self, account: Account, tokens: int) -> None:
        self._account, self._tokens = account, tokens

    def settle(self, tokens: int) -> None:
        self._account.charge(tokens - self._tokens)


@attrs.define(eq=False)
class PerTenant:
    """Limits requests and tokens of each tenant, in this process: with `frontend.processes` each has buckets of its own."""

    requests: str | None = attrs.field(default=None, validator=valid_rates)
    """For each tenant: `"600/minute"`, or several: `"10/second; 300/minute"`; no limit when unset."""
    tokens: str | None = attrs.field(default=None, validator=valid_rates)
    """For each tenant, prompt and answer together."""
    tenants: Mapping[str, Limits] = attrs.field(factory=dict)
    """Other limits for some tenants, by name."""

    _accounts: OrderedDict[str | None, Account] = attrs.field(init=False, factory=OrderedDict, repr=False)

    async def admit(self, tenant: str | None) -> None:
        self._account(tenant).admit(time.monotonic())

    async def reserve(self, tenant: str | None, tokens: int) -> _Held:
        account = self._account(tenant)
        account.reserve(tokens, time.monotonic())
        return _Held(account, tokens)

    def _account(self, tenant: str | None) -> Account:
        if (account := self._accounts.get(tenant)) is None:
            own = None if tenant is None else self.tenants.get(tenant)
            account = self._accounts[tenant] = Account(Limits(self.requests, self.tokens), own, time.monotonic())
            if len(self._accounts) > TENANTS:
                self._accounts.popitem(last=False)
        self._accounts.move_to_end(tenant)
        return account


def _short(buckets: list[Bucket], cost: float, now: float) -> tuple[float, Bucket] | None:
    """The longest wait, and for whom; `None`: all of them hold `cost`."""
    wait, bucket = max(((bucket.wait(cost, now), bucket) for bucket in buckets), key=lambda pair: pair[0], default=(0.0, None))
    return (wait, bucket) if wait > 0 and bucket is not None else None
