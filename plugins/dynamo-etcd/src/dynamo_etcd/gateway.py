"""Calls to etcd's JSON gateway: one endpoint at a time, another one when it fails, and never longer than the timeout."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import attrs
import msgspec

from dynamo_core.errors import ConfigError, Problem, StoreUnavailable
from dynamo_etcd.wire import Fault, Token

T = TypeVar("T")
log = logging.getLogger(__name__)

NOT_FOUND = 5
OUT_OF_RANGE = 11
"""The revision is compacted, or does not exist yet."""
PERMISSION_DENIED = 7
INVALID_ARGUMENT = 3
_UNAUTHENTICATED = 16
_ELSEWHERE = {4, 14}
"""This member cannot answer now (it has no leader, for example); another one may."""
_STALE_AUTH = "auth store is old"
_ROUND = 0.1
"""Seconds between two rounds over the endpoints while a cluster elects a leader."""


class Refused(Exception):
    """etcd answered, and said no. `code` is the gRPC code."""

    def __init__(self, code: int, message: str) -> None:
        self.code = code
        super().__init__(message)


@attrs.frozen
class EtcdTls:
    """For `https` endpoints."""

    ca: Path
    """Who signed the certificates of the etcd members."""
    cert: Path | None = None
    """This process's certificate, where etcd asks for one (`--client-cert-auth`)."""
    key: Path | None = None
    """Its private key, unencrypted."""


class Gateway:
    """`call` asks whichever endpoint is in use; `lines` reads a stream from it, which ends when the endpoint falls out of use."""

    def __init__(self, endpoints: Sequence[str], user: str | None, password: str | None, tls: EtcdTls | None, timeout: float) -> None:
        self.trouble: str | None = None
        """Why the last call got no answer from any endpoint."""
        self._endpoints = [endpoint.rstrip("/") for endpoint in endpoints]
        self._in_use = 0
        self._user = user
        self._password = password
        self._tls = tls
        self._timeout = timeout
        self._token: str | None = None
        self._secure: ssl.SSLContext | None = None
        self._files: tuple[int, ...] = ()
        self._session: aiohttp.ClientSession | None = None
        self._streams: set[aiohttp.ClientResponse] = set()

    async def open(self) -> None:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False)

    async def close(self) -> None:
        self._cut()
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # ------------------------------------------------------------------ calls

    async def call(self, path: str, body: Mapping[str, Any], answer: type[T]) -> T:
        """:raises Refused: etcd said no. :raises StoreUnavailable: no endpoint answered in time."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._timeout
        renewed = False
        while True:
            electing, troubles = False, list[str]()
            for left in range(len(self._endpoints), 0, -1):
                endpoint = self._endpoints[self._in_use]
                try:
                    result = await self._ask(endpoint, path, body, answer, max(0.05, (end - loop.time()) / left))
                except Refused as e:
                    if not renewed and self._token is not None and (e.code == _UNAUTHENTICATED or _STALE_AUTH in str(e)):
                        renewed, electing, self._token = True, True, None
                        break
                    if e.code not in _ELSEWHERE:
                        self._recovered()
                        raise
                    electing = True
                    troubles.append(f"{endpoint}: {e}")
                except (OSError, aiohttp.ClientError, TimeoutError, ssl.SSLError) as e:
                    troubles.append(f"{endpoint}: {str(e) or f'no answer within {self._timeout / len(self._endpoints):.3g} s'}")
                else:
                    self._recovered()
                    return result
                self._leave(endpoint)
            if not electing or loop.time() + _ROUND >= end:
                raise self._failed("; ".join(troubles))
            if troubles:
                await asyncio.sleep(_ROUND)

    async def _ask(self, endpoint: str, path: str, body: Mapping[str, Any], answer: type[T], seconds: float) -> T:
        async with asyncio.timeout(seconds):
            headers = await self._authorization(endpoint)
            async with self._open().post(f"{endpoint}/v3/{path}", data=msgspec.json.encode(body), headers=headers, ssl=self._ssl()) as response:
                content = await response.read()
        if response.status != 200:
            raise _refusal(response.status, content)
        try:
            return msgspec.json.decode(content, type=answer, strict=False)
        except msgspec.DecodeError as e:
            raise aiohttp.ClientPayloadError(f"this does not look like etcd's JSON gateway: {e}") from e

    async def _authorization(self, endpoint: str) -> dict[str, str]:
        if self._user is None:
            return {}
        if self._token is None:
            credentials = {"name": self._user, "password": str(self._password or "")}
            async with self._open().post(f"{endpoint}/v3/auth/authenticate", data=msgspec.json.encode(credentials), ssl=self._ssl()) as response:
                content = await response.read()
            if response.status != 200:
                raise _refusal(response.status, content)
            self._token = msgspec.json.decode(content, type=Token, strict=False).token
        return {"Authorization": self._token}

    # ------------------------------------------------------------------ streams

    @asynccontextmanager
    async def lines(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[AsyncGenerator[bytes, None], None]:
        """The lines of a streamed answer from the endpoint in use. Ends with an `OSError` or `aiohttp.ClientError` when that breaks."""
        endpoint = self._endpoints[self._in_use]
        async with asyncio.timeout(self._timeout):
            headers = await self._authorization(endpoint)
            response = await self._open().post(f"{endpoint}/v3/{path}", data=msgspec.json.encode(body), headers=headers, ssl=self._ssl(),
                                               timeout=aiohttp.ClientTimeout(total=None))
        self._streams.add(response)
        try:
            if response.status != 200:
                raise _refusal(response.status, await response.read())
            yield _split(response)
        finally:
            self._streams.discard(response)
            response.close()

    # ------------------------------------------------------------------ endpoints

    def _leave(self, endpoint: str) -> None:
        """What is open to this endpoint may be dead without knowing it, so it ends; the next call goes to the next one."""
        if self._endpoints[self._in_use] == endpoint:
            self._in_use = (self._in_use + 1) % len(self._endpoints)
            self._cut()

    def _cut(self) -> None:
        for response in self._streams:
            response.close()

    def _failed(self, because: str) -> StoreUnavailable:
        trouble = f"etcd does not answer: {because}"
        if self.trouble is None:
            log.warning("lost etcd: %s", because)
        self.trouble = trouble
        return StoreUnavailable(trouble)

    def _recovered(self) -> None:
        if self.trouble is not None:
            self.trouble = None
            log.warning("etcd is back at %s", self._endpoints[self._in_use])

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise StoreUnavailable("etcd discovery is not open")
        return self._session

    def _ssl(self) -> ssl.SSLContext | bool:
        """Made again when the files have changed: new connections use renewed certificates."""
        if self._tls is None:
            return True
        try:
            files = tuple(path.stat().st_mtime_ns for path in (self._tls.ca, self._tls.cert, self._tls.key) if path)
            if self._secure is None or files != self._files:
                secure = ssl.create_default_context(cafile=self._tls.ca)
                if self._tls.cert is not None:
                    secure.load_cert_chain(self._tls.cert, self._tls.key)
                self._secure, self._files = secure, files
        except (OSError, ssl.SSLError) as e:
            if self._secure is None:
                raise ConfigError(Problem(f"discovery.tls cannot be used: {e}")) from e
            log.warning("renewed tls files cannot be used, the old ones stay: %s", e)
        return self._secure


async def _split(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    rest = b""
    async for chunk in response.content.iter_any():
        *complete, rest = (rest + chunk).split(b"\n")
        for line in complete:
            if line:
                yield line
    raise aiohttp.ClientPayloadError("etcd ended the stream")


def _refusal(status: int, content: bytes) -> Refused | aiohttp.ClientError:
    try:
        fault = msgspec.json.decode(content, type=Fault, strict=False)
    except msgspec.DecodeError:
        return aiohttp.ClientPayloadError(f"HTTP {status}, and not from etcd's JSON gateway: {content[:80]!r}")
    return Refused(fault.code or fault.grpc_code, fault.message.removeprefix("etcdserver: "))
