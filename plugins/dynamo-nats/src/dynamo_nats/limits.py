"""`rate_limiter = { use = "nats-per-tenant", ... }`: limits that all frontends of a fleet hold together.

What each tenant has left stands in the memory of the servers. A frontend reads it, decides all its waiting requests of that tenant, and writes what remains, if
nobody was faster. While NATS is away each frontend decides by what it knew last, and says so.
"""

from __future__ import annotations

import asyncio
import random
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import attrs
from attrs import validators as v
from nats.errors import Error as NatsError

from dynamo_core.errors import RateLimited, StoreUnavailable
from dynamo_core.frontend.limits import TENANTS, Account, Limits, rates, valid_rates
from dynamo_nats.connection import Connection, NatsOptions
from dynamo_nats.counts import Counts, Overtaken
from dynamo_nats.ledger import token

_ATTEMPTS = 50
"""Times that others may be faster, until we decide by what we know."""
_FAREWELL = 2.0
"""Seconds for which the last settlements may still leave."""


@attrs.frozen
class _Ask:
    change: Callable[[Account, float], None]
    answer: asyncio.Future[None] | None = None
    """Nobody waits for a settlement."""
    tokens: int = 0
    """To be given back should nobody wait any more."""


class _Shared:
    """One tenant's account, as we know it, and who waits for a decision."""

    def __init__(self, counts: Counts, name: str, account: Account) -> None:
        self.account = account
        self.working: asyncio.Task[None] | None = None
        self._counts = counts
        self._name = name
        self._version: int | None = None
        """Of what we know; `None`: it must be read."""
        self._alone = False
        """We have decided something that the others do not know."""
        self._waiting: list[_Ask] = []

    def forget(self) -> None:
        self._version = None

    async def ask(self, change: Callable[[Account, float], None], tokens: int = 0) -> None:
        """:raises RateLimited: the answer."""
        answer = asyncio.get_running_loop().create_future()
        self._enqueue(_Ask(change, answer, tokens))
        try:
            await answer
        except asyncio.CancelledError:
            if not answer.cancelled() and answer.exception() is None:  # it came with the cancellation
                self.charge(-tokens)
            raise

    def charge(self, tokens: int) -> None:
        if tokens:
            self._enqueue(_Ask(lambda account, _: account.charge(tokens)))

    def _enqueue(self, ask: _Ask) -> None:
        self._waiting.append(ask)
        if self.working is None or self.working.done():
            self.working = asyncio.create_task(self._work(), name="nats limits: decide")

    async def _work(self) -> None:
        while self._waiting:
            asks, self._waiting = self._waiting, []
            try:
                outcomes = await self._decide(asks)
            except BaseException as e:
                for ask in asks:
                    if ask.answer is not None and not ask.answer.done():
                        ask.answer.set_exception(e if isinstance(e, Exception) else StoreUnavailable("the limiter is closing"))
                raise
            for ask, refusal in zip(asks, outcomes, strict=True):
                if ask.answer is None:
                    continue
                if not ask.answer.done():
                    ask.answer.set_exception(refusal) if refusal else ask.answer.set_result(None)
                elif not refusal:
                    self.charge(-ask.tokens)

    async def _decide(self, asks: list[_Ask]) -> list[RateLimited | None]:
        before = self._levels()
        for attempt in range(_ATTEMPTS):
            if not self._counts.there:
                break
            try:
                if read := self._version is None:
                    await self._read()
                before, outcomes = self._levels(), self._apply(asks)
                if any(outcomes) and not read:  # somebody may have given back meanwhile
                    self.forget()
                elif all(outcomes) and not self._alone:
                    return outcomes
                else:
                    self._version = await self._counts.write(self._name, self._levels(), self._counts.now, self._version or 0)
                    self._alone = False
                    return outcomes
            except Overtaken:
                self.forget()
                await asyncio.sleep(random.random() * 0.001 * attempt)
            except (NatsError, TimeoutError) as e:
                self._counts.lost(e)
            self._restore(before)
        self.forget()
        self._alone = True
        return self._apply(asks)

    def _apply(self, asks: list[_Ask]) -> list[RateLimited | None]:
        outcomes: list[RateLimited | None] = []
        for ask in asks:
            try:
                if ask.answer is None or not ask.answer.done():
                    ask.change(self.account, self._counts.now)
                outcomes.append(None)
            except RateLimited as refusal:
                outcomes.append(refusal)
        return outcomes

    async def _read(self) -> None:
        stored, self._version = await self._counts.read(self._name)
        if stored is not None:
            mine = self._levels()
            for bucket, level in zip(self._buckets, stored.values, strict=True):
                bucket.set(level, stored.at)
            if self._alone:  # what was used meanwhile is used
                self._restore([min(pair) for pair in zip(mine, self._levels(), strict=True)])

    @property
    def _buckets(self):
        return [*self.account.requests, *self.account.tokens]

    def _levels(self) -> list[float]:
        now = self._counts.now
        return [bucket.level(now) for bucket in self._buckets]

    def _restore(self, levels: list[float]) -> None:
        now = self._counts.now
        for bucket, level in zip(self._buckets, levels, strict=True):
            bucket.set(level, now)


class _Held:
    """A reservation of tokens."""

    __slots__ = ("_shared", "_tokens")

    def __init__(self, shared: _Shared, tokens: int) -> None:
        self._shared, self._tokens = shared, tokens

    def settle(self, tokens: int) -> None:
        if self._shared.account.tokens:
            self._shared.charge(tokens - self._tokens)


@attrs.define(eq=False, kw_only=True)
class NatsPerTenant(NatsOptions):
    """Limits requests and tokens of each tenant, counted by all frontends together. JetStream must be on."""

    requests: str | None = attrs.field(default=None, validator=valid_rates)
    """For each tenant: `"600/minute"`, or several: `"10/second; 300/minute"`; no limit when unset."""
    tokens: str | None = attrs.field(default=None, validator=valid_rates)
    """For each tenant, prompt and answer together."""
    tenants: Mapping[str, Limits] = attrs.field(factory=dict)
    """Other limits for some tenants, by name."""
    replicas: int = attrs.field(default=1, validator=[v.ge(1), v.le(5)])
    """Servers that hold the counts; 3 in a cluster that may lose one without forgetting."""
    timeout: float = attrs.field(default=1.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds that a request waits for NATS, once; then every frontend counts alone until NATS answers."""

    _connection: Connection | None = attrs.field(init=False, default=None, repr=False)
    _counts: Counts | None = attrs.field(init=False, default=None, repr=False)
    _opening: asyncio.Lock = attrs.field(init=False, factory=asyncio.Lock, repr=False)
    _accounts: OrderedDict[str | None, _Shared] = attrs.field(init=False, factory=OrderedDict, repr=False)

    async def __aenter__(self) -> NatsPerTenant:
        """:raises ConfigError: NATS does not let us in, or keeps no streams. :raises StoreUnavailable: it does not answer."""
        await self._open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        if working := [shared.working for shared in self._accounts.values() if shared.working is not None]:
            await asyncio.wait(working, timeout=_FAREWELL)
        counts, self._counts = self._counts, None
        connection, self._connection = self._connection, None
        if counts is not None and connection is not None:
            await counts.close()
            await connection.close()

    async def admit(self, tenant: str | None) -> None:
        shared = await self._account(tenant)
        if shared.account.requests:
            await shared.ask(lambda account, now: account.admit(now))

    async def reserve(self, tenant: str | None, tokens: int) -> _Held:
        shared = await self._account(tenant)
        if shared.account.tokens:
            await shared.ask(lambda account, now: account.reserve(tokens, now), tokens)
        return _Held(shared, tokens)

    def problem(self) -> str | None:
        if self._counts is None or (problem := self._counts.problem()) is None:
            return None
        return f"each frontend counts alone: {problem}"

    async def _account(self, tenant: str | None) -> _Shared:
        counts = self._counts or await self._open()
        if (shared := self._accounts.get(tenant)) is None:
            own = None if tenant is None else self.tenants.get(tenant)
            account = Account(Limits(self.requests, self.tokens), own, counts.now)
            # Frontends that are configured unlike count apart.
            rules = zlib.crc32(";".join(map(str, (*account.requests, "", *account.tokens))).encode())
            name = f"{'nobody' if tenant is None else f'tenant.t{token(tenant)}'}.{rules:08x}"
            shared = self._accounts[tenant] = _Shared(counts, name, account)
            if len(self._accounts) > TENANTS:
                self._accounts.popitem(last=False)
        self._accounts.move_to_end(tenant)
        return shared

    async def _open(self) -> Counts:
        async with self._opening:
            if self._counts is None:
                connection = Connection(self, f"dynamo-limits-{random.getrandbits(64):x}", 1)
                try:
                    await connection.open()
                except OSError as e:
                    raise StoreUnavailable(str(e)) from e
                counts = Counts(connection, self.prefix, self._keep(), self.replicas, self.timeout)
                try:
                    await counts.open()
                except BaseException as e:
                    await connection.close()
                    if isinstance(e, (NatsError, TimeoutError)):
                        raise StoreUnavailable(f"NATS does not keep limits: {e or 'no answer'}") from e
                    raise
                counts.on_jump.append(self._forget)
                self._connection, self._counts = connection, counts
            return self._counts

    def _keep(self) -> float:
        """Seconds after which an unused account is full whatever was used of it: most debts are smaller than a limit."""
        texts: list[Any] = [self.requests, self.tokens, *(text for own in self.tenants.values() for text in (own.requests, own.tokens))]
        return 2 * max((seconds for text in texts for _, seconds in rates(text)), default=60.0)

    def _forget(self) -> None:
        for shared in self._accounts.values():
            shared.forget()
