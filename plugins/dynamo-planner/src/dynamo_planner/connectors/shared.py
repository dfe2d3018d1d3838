"""`global`: any other connector, within a budget that a global planner keeps.

Growing needs a grant, going down needs nobody. A wish that is parked is carried out here when it is granted, unless something else was asked for meanwhile.
"""

# ruff: noqa: RUF009  (`choice` makes an attrs field)
from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Mapping
from pathlib import Path

import attrs
import httpx
import msgspec
from attrs import validators as v

from dynamo_core.config import Secret, Use, build
from dynamo_core.config.schema import choice
from dynamo_core.ending import ended
from dynamo_core.errors import ConfigError, ConnectorUnavailable, DynamoError, Problem, ScaleRefused
from dynamo_core.httpx_client import HttpClient
from dynamo_core.plugins import Plugins
from dynamo_core.scaling import Connector, RoleState
from dynamo_planner.sharing.wire import PATH, Answer, Ask

log = logging.getLogger("dynamo.planner.shared")


@attrs.frozen
class _Intent:
    targets: Mapping[str, int]
    reason: str


@attrs.define(eq=False)
class SharedConnector:
    """Options of `connector = { use = "global" }`."""

    url: str = attrs.field(validator=v.matches_re(r"https?://.+"))
    """Where the global planner is."""
    token: Secret
    """What this planner proves itself by."""
    connector: Use = choice("connector", "local")
    """What scales, once there is a grant."""
    every: float = attrs.field(default=5.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds between two calls; well below the global planner's `lease`."""
    timeout: float = attrs.field(default=5.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds that an answer may take."""
    ca: Path | None = None
    """Certificates to trust instead of the system's (PEM)."""

    _inner: Connector = attrs.field(init=False, default=None, repr=False)
    _client: httpx.AsyncClient | None = attrs.field(init=False, default=None, repr=False)
    _intent: _Intent | None = attrs.field(init=False, default=None, repr=False)
    _scaling: asyncio.Lock = attrs.field(init=False, factory=asyncio.Lock, repr=False)
    _calling: asyncio.Task[None] | None = attrs.field(init=False, default=None, repr=False)

    # -------------------------------------------------------------- the contract

    async def start(self) -> None:
        await self.over(build(self.connector, "connector", Plugins.load()))

    async def over(self, inner: Connector) -> None:
        """Scale by this connector, instead of the one that the options name. It is started here, and closed by `close`."""
        self._inner = inner
        try:
            trust = ssl.create_default_context(cafile=str(self.ca)) if self.ca else True
        except (OSError, ssl.SSLError) as e:
            raise ConfigError(Problem(f"the certificates of {self.ca} cannot be read: {e}")) from e
        self._client = HttpClient(base_url=self.url, timeout=self.timeout, verify=trust, headers={"authorization": f"Bearer {self.token}"})
        try:
            await inner.start()
        except BaseException:
            await self._client.aclose()
            raise
        self._calling = asyncio.create_task(self._call_again(), name="global planner")

    async def observe(self) -> Mapping[str, RoleState]:
        self._connected()
        return await self._inner.observe()

    async def scale(self, targets: Mapping[str, int], *, reason: str) -> None:
        self._connected()
        async with self._scaling:
            self._intent = None
            seen = await self._inner.observe()
            wanted = _wanted(seen, targets)
            if wanted > _wanted(seen, {}) and all(role in seen and count >= 0 for role, count in targets.items()):
                answer = await self._ask(wanted, seen, reason)
                if answer.parked is not None:
                    self._intent = _Intent(dict(targets), reason)
                    raise ScaleRefused(f"the global planner has parked it: {answer.why}")
            await self._inner.scale(targets, reason=reason)

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        await ended(self._calling)
        try:
            await self._inner.close()
        finally:
            await client.aclose()

    # -------------------------------------------------------------- the global planner

    async def _call_again(self) -> None:
        """Say again and again what is wanted and used, and do what the answers say."""
        said = ""
        while True:
            try:
                async with self._scaling:
                    await self._call()
                problem = ""
            except DynamoError as e:
                problem = str(e)
            if problem != said:
                log.warning("%s", problem) if problem else log.info("the global planner answers again")
            said = problem
            await asyncio.sleep(self.every)

    async def _call(self) -> None:
        seen = await self._inner.observe()
        intent = self._intent
        answer = await self._ask(_wanted(seen, intent.targets if intent else {}), seen, intent.reason if intent else "")
        if answer.limit is not None and answer.limit < _wanted(seen, {}):
            self._intent = None
            await self._inner.scale(_within(answer.limit, seen), reason=f"the global planner: {answer.why}")
        elif intent is not None and answer.parked is None:
            self._intent = None
            log.info("granted what was parked: %s", dict(intent.targets))
            await self._inner.scale(intent.targets, reason=f"{intent.reason} (was parked)")

    async def _ask(self, wanted: int, seen: Mapping[str, RoleState], reason: str) -> Answer:
        in_use = sum((state.ready + state.starting + state.draining) * state.gpus_per_replica for state in seen.values())
        client = self._connected()
        try:
            response = await client.post(PATH, content=msgspec.json.encode(Ask(wanted=wanted, in_use=in_use, reason=reason)))
            if response.status_code == 200:
                return msgspec.json.decode(response.content, type=Answer)
        except (httpx.HTTPError, msgspec.MsgspecError) as e:
            raise ConnectorUnavailable(f"the global planner at {self.url} does not answer, so nothing may grow: {type(e).__name__}: {e}") from e
        if response.status_code == 401:
            raise ScaleRefused(f"the global planner at {self.url} does not know this planner: its token is that of nobody")
        raise ConnectorUnavailable(f"the global planner at {self.url} answers {response.status_code}: {response.text[:200]}")

    def _connected(self) -> httpx.AsyncClient:
        if self._client is None:
            raise ConnectorUnavailable("the connector is not connected")
        return self._client


def _wanted(seen: Mapping[str, RoleState], targets: Mapping[str, int]) -> int:
    """GPUs of the targets, and of what is desired where there is none."""
    return sum(targets.get(role, state.desired) * state.gpus_per_replica for role, state in seen.items())


def _within(limit: int, seen: Mapping[str, RoleState]) -> dict[str, int]:
    """Targets that use at most so many GPUs: from the role that uses most, and the last replica of a role only when nothing else is left."""
    targets = {role: state.desired for role, state in seen.items()}
    while _wanted(seen, targets) > limit:
        costly = [role for role, state in seen.items() if targets[role] and state.gpus_per_replica]
        most = max(costly, key=lambda role: (targets[role] > 1, targets[role] * seen[role].gpus_per_replica))
        targets[most] -= 1
    return {role: count for role, count in targets.items() if count != seen[role].desired}
