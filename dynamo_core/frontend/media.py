"""Images that requests name: decoded from data URIs, or fetched, without being led to places that only this server can reach.

Every address that a name resolves to is checked, and the connection goes to the address that was checked; every redirect starts over.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from typing import Any, cast
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import httpcore

from dynamo_core.config.schema import Media
from dynamo_core.errors import RequestError

_MAGIC = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif"), (b"BM", "image/bmp"))
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 3


class MediaFetcher:
    """One for each frontend. Connections are not kept: hosts that clients choose are rarely asked twice."""

    def __init__(self, settings: Media) -> None:
        self._settings = settings
        self._places = asyncio.Semaphore(settings.max_parallel)

    async def images(self, urls: Sequence[str]) -> list[dict[str, Any]]:
        """What each URL leads to: `type`, `mime`, `data` and `digest`. :raises RequestError: one of them may not be used, or has no image."""
        if len(urls) > self._settings.max_items:
            raise RequestError(f"{len(urls)} images are more than {self._settings.max_items}, the limit of this server", param="messages")
        tasks = [asyncio.ensure_future(self._image(url)) for url in urls]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _image(self, url: str) -> dict[str, Any]:
        data = self._decoded(url) if url[:5].lower() == "data:" else await self._bounded(url)
        if (mime := _kind(data)) is None:
            raise RequestError("image_url: that is no PNG, JPEG, GIF, WebP or BMP image", param="messages")
        return {"type": "image", "mime": mime, "data": data, "digest": hashlib.sha256(data).hexdigest()}

    def _decoded(self, url: str) -> bytes:
        head, comma, body = url.partition(",")
        if not comma:
            raise RequestError("image_url: a data URI has a comma before its content", param="messages")
        if len(body) > self._settings.max_bytes * 4:
            raise self._too_large()
        try:
            data = base64.b64decode(unquote_to_bytes(body), validate=True) if head.lower().endswith(";base64") else unquote_to_bytes(body)
        except (binascii.Error, ValueError):
            raise RequestError("image_url: the content of the data URI is not valid base64", param="messages") from None
        if len(data) > self._settings.max_bytes:
            raise self._too_large()
        return data

    async def _bounded(self, url: str) -> bytes:
        try:
            async with self._places, asyncio.timeout(self._settings.timeout):
                return await self._fetched(url)
        except TimeoutError:
            raise RequestError(f"image_url: {_shown(url)} was not complete after {self._settings.timeout:g} s", param="messages") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, OSError, UnicodeError) as e:
            raise RequestError(f"image_url: {_shown(url)} cannot be fetched: {type(e).__name__}", param="messages") from None

    async def _fetched(self, url: str) -> bytes:
        async with httpcore.AsyncConnectionPool(max_connections=1, network_backend=_Guarded(self._settings)) as pool:
            for _ in range(_MAX_REDIRECTS + 1):
                self._allow(url)
                async with pool.stream("GET", url, headers={"accept": "image/*", "user-agent": "dynamo"}) as response:
                    if response.status in _REDIRECTS and (onward := _header(response.headers, b"location")) is not None:
                        url = urljoin(url, onward)
                        continue
                    if response.status != 200:
                        raise RequestError(f"image_url: {_shown(url)} answers with status {response.status}", param="messages")
                    if int(_header(response.headers, b"content-length") or 0) > self._settings.max_bytes:
                        raise self._too_large()
                    found = bytearray()
                    async for part in response.aiter_stream():
                        found += part
                        if len(found) > self._settings.max_bytes:
                            raise self._too_large()
                    return bytes(found)
        raise RequestError(f"image_url: more than {_MAX_REDIRECTS} redirects", param="messages")

    def _allow(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            raise RequestError(f"image_url: {_shown(url)} is not a URL", param="messages") from None
        if parts.scheme not in self._settings.schemes or not host:
            raise RequestError(f"image_url: only data URIs and {', '.join(self._settings.schemes)} are fetched here, not {_shown(url)}", param="messages")
        if parts.username is not None or parts.password is not None:
            raise RequestError("image_url: a URL with a user name or password is not fetched", param="messages")
        if self._settings.hosts and not any(host == allowed or host.endswith(f".{allowed}") for allowed in self._settings.hosts):
            raise RequestError(f"image_url: the host {host[:100]!r} is not among those that this server fetches from", param="messages")
        if port is not None and port not in (80, 443) and not self._settings.allow_private:
            raise RequestError(f"image_url: port {port} is not one that this server fetches from", param="messages")

    def _too_large(self) -> RequestError:
        return RequestError(f"image_url: the image is larger than {self._settings.max_bytes} bytes, the limit of this server", param="messages")


class _Guarded(httpcore.AsyncNetworkBackend):
    """Connects to public addresses only, and to the very address that it looked at."""

    def __init__(self, settings: Media) -> None:
        self._settings = settings
        self._inner = cast(httpcore.AsyncNetworkBackend, httpcore.AnyIOBackend())

    async def connect_tcp(self, host: str, port: int, timeout: float | None = None, local_address: str | None = None,
                          socket_options: Iterable[Any] | None = None) -> httpcore.AsyncNetworkStream:  # fmt: skip
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        if not self._settings.allow_private and (not addresses or not all(map(_public, addresses))):
            raise RequestError(f"image_url: the host {host[:100]!r} is not on the public internet", param="messages")
        return await self._inner.connect_tcp(addresses[0], port, timeout, local_address, socket_options)

    async def connect_unix_socket(self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None) -> httpcore.AsyncNetworkStream:
        raise RequestError("image_url: sockets of this machine are not fetched from", param="messages")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        # Whatever carries an IPv4 address inside leads where that address leads.
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is None and found in ipaddress.IPv6Network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return inner.is_global and not inner.is_multicast
    return found.is_global and not found.is_multicast


def _kind(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((mime for magic, mime in _MAGIC if data.startswith(magic)), None)


def _header(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> str | None:
    return next((value.decode("latin-1") for name, value in headers if name.lower() == wanted), None)


def _shown(url: str) -> str:
    """For error messages: without a query, which may hold a signature."""
    return repr(url.partition("?")[0][:200])
