"""Calls to a Kubernetes API server: JSON over HTTPS, each bounded in time; lists in pages; watches that end on time."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from dynamo_kubernetes.access import Credentials

log = logging.getLogger(__name__)

MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"

NOT_FOUND = 404
CONFLICT = 409
GONE = 410
"""The resource version is too old: read the present again."""
INVALID = 422

_PAGE = 250
"""Objects that are read at once."""
_WATCH = 60
"""Seconds after which the server ends a watch, with a bookmark before, so that a dead connection is noticed soon after."""
_LATE = 15
"""Seconds that it may be late."""
_LONGEST_PAUSE = 2.0
"""Seconds that we pause, at most, when the server asks us to come back later."""

BROKEN = (OSError, ssl.SSLError, aiohttp.ClientError, TimeoutError, msgspec.DecodeError)
Object = dict[str, Any]
"""A Kubernetes object as the server sent it."""


class Refused(Exception):
    """The API server answered, and said no. `code` is the HTTP status."""

    def __init__(self, code: int, message: str, reason: str = "") -> None:
        self.code = code
        self.reason = reason
        super().__init__(message)


class Unreachable(Exception):
    """The API server did not answer, or could not."""


class Kube:
    """One API server. `async with Kube(...) as kube`."""

    def __init__(self, credentials: Credentials, timeout: float, agent: str = "dynamo") -> None:
        self.namespace = credentials.namespace
        self.trouble: str | None = None
        """Why the last call got no answer."""
        self._credentials = credentials
        self._timeout = timeout
        self._agent = agent
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Kube:
        connector = aiohttp.TCPConnector(limit=0, socket_factory=_kept_alive)
        self._session = aiohttp.ClientSession(connector=connector, headers={"User-Agent": self._agent, "Accept": "application/json"})
        return self

    async def __aexit__(self, *exc: object) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    @property
    def server(self) -> str:
        return self._credentials.server

    def path(self, api: str, plural: str, name: str = "", subresource: str = "") -> str:
        """`api` is "v1" or "group/version"."""
        root = f"/api/{api}" if "/" not in api else f"/apis/{api}"
        return "/".join(part for part in (f"{root}/namespaces/{self.namespace}/{plural}", name, subresource) if part)

    # ------------------------------------------------------------------ calls

    async def call(self, method: str, path: str, body: Any = None, *, content_type: str = "application/json", **params: str) -> Object:
        """:raises Refused: the server said no. :raises Unreachable: no answer in time."""
        renewed = False
        try:
            async with asyncio.timeout(self._timeout):
                while True:
                    async with self._request(method, path, body, content_type, params, await self._credentials.headers()) as response:
                        content, status, pause = await response.read(), response.status, response.headers.get("Retry-After")
                    if status == 401 and not renewed and self._credentials.renew():
                        renewed = True
                    elif status == 429 or (status >= 500 and pause):
                        await asyncio.sleep(min(float(pause or 1) if (pause or "1").isdigit() else 1.0, _LONGEST_PAUSE))
                    else:
                        break
            refused = _refusal(status, content) if status >= 400 else None
            answer: Object = {} if refused is not None else msgspec.json.decode(content)
        except BROKEN as e:
            raise self._failed(_cause(e) or f"no answer within {self._timeout:g} s") from e
        if refused is not None and refused.code >= 500:
            raise self._failed(f"it says {refused.code}: {refused}")
        self._recovered()
        if refused is not None:
            raise refused
        return answer

    async def listing(self, path: str, **params: str) -> tuple[list[Object], str]:
        """All objects, as they are at one resource version, and that version."""
        items: list[Object] = []
        more = ""
        while True:
            try:
                answer = await self.call("GET", path, limit=str(_PAGE), **({"continue": more} if more else {}), **params)
            except Refused as e:
                if e.code != GONE or not more:
                    raise
                items, more = [], ""  # the pages took too long: begin again
                continue
            items += answer.get("items") or []
            more = answer["metadata"].get("continue", "")
            if not more:
                return items, answer["metadata"]["resourceVersion"]

    @asynccontextmanager
    async def watch(self, path: str, version: str, **params: str) -> AsyncGenerator[AsyncIterator[Object], None]:
        """Every change after `version`, bookmarks too, until the server ends it. :raises Refused: `GONE` when the version is too old."""
        params |= {"watch": "true", "allowWatchBookmarks": "true", "resourceVersion": version, "timeoutSeconds": str(_WATCH)}
        try:
            async with asyncio.timeout(_WATCH + _LATE):
                headers = await self._credentials.headers()
                async with self._request("GET", path, None, "", params, headers) as response:
                    if response.status >= 400:
                        if response.status == 401:
                            self._credentials.renew()
                        raise _refusal(response.status, await response.read())
                    yield _events(response)
        except BROKEN as e:
            raise Unreachable(f"the watch of {path} broke: {e or 'it went silent'}") from e

    def _request(self, method: str, path: str, body: Any, content_type: str, params: Mapping[str, str], headers: dict[str, str]) -> Any:
        if self._session is None:
            raise Unreachable("the connection to Kubernetes is not open")
        if body is not None:
            headers = {**headers, "Content-Type": content_type}
        return self._session.request(method, self.server + path, params=params, headers=headers, ssl=self._credentials.tls(),
                                     data=None if body is None else msgspec.json.encode(body),
                                     timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._timeout), server_hostname=self._credentials.server_name)

    # ------------------------------------------------------------------ trouble

    def _failed(self, because: str) -> Unreachable:
        if self.trouble is None:
            log.warning("lost the API server at %s: %s", self.server, because)
        self.trouble = f"the API server at {self.server} does not answer: {because}"
        return Unreachable(self.trouble)

    def _recovered(self) -> None:
        if self.trouble is not None:
            self.trouble = None
            log.warning("the API server at %s is back", self.server)


async def _events(response: aiohttp.ClientResponse) -> AsyncGenerator[Object, None]:
    rest = bytearray()
    async for chunk in response.content.iter_any():
        *lines, tail = chunk.split(b"\n")
        for line in lines:
            rest += line
            if rest:
                event = msgspec.json.decode(rest)
                rest.clear()
                if event["type"] == "ERROR":
                    status = event["object"]
                    raise Refused(int(status.get("code") or 500), str(status.get("message", "")), str(status.get("reason", "")))
                yield event
        rest += tail


def _cause(error: BaseException) -> str:
    """aiohttp writes the context of TLS into its message."""
    return str(error.os_error) if isinstance(error, aiohttp.ClientConnectorError) else str(error)


def _refusal(status: int, content: bytes) -> Refused:
    try:
        said: Any = msgspec.json.decode(content)
        return Refused(status, str(said.get("message", "")), str(said.get("reason", "")))
    except (msgspec.DecodeError, AttributeError):
        return Refused(status, content[:200].decode(errors="replace").strip())


def _kept_alive(address: Any) -> socket.socket:
    """A peer that vanished without a word is noticed after about half a minute."""
    made = socket.socket(address[0], address[1], address[2])
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if (option := getattr(socket, name, None)) is not None:
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made
