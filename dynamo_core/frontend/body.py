"""Request bodies: bounded in size and in time."""

from __future__ import annotations

import asyncio

from starlette.types import Receive

from dynamo_core.errors import BodyTooLarge, BodyTooSlow, Cancelled

LINGER = 1.0
"""Seconds for which the rest of a refused body is read and thrown away: a client that is still sending reads no answer."""


async def read_body(receive: Receive, *, limit: int, timeout: float) -> bytes | bytearray:
    """:raises BodyTooLarge: as soon as it is. :raises BodyTooSlow: not complete in `timeout` seconds. :raises Cancelled: the client left."""
    try:
        async with asyncio.timeout(timeout):
            first, more = await _piece(receive, 0, limit)
            if not more:
                return first
            body = bytearray(first)
            while True:
                piece, more = await _piece(receive, len(body), limit)
                body += piece
                if not more:
                    return body
    except TimeoutError:
        raise BodyTooSlow(f"the body was not complete after {timeout:g} s") from None


async def _piece(receive: Receive, so_far: int, limit: int) -> tuple[bytes, bool]:
    """The next bytes, and whether there are more."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Cancelled("the client left before its request was complete")
    piece: bytes = message.get("body", b"")
    if so_far + len(piece) > limit:
        raise BodyTooLarge(f"the body is larger than {limit} bytes, the limit of this server")
    return piece, message.get("more_body", False)


async def discard(receive: Receive) -> None:
    """Read the rest of the body into nothing."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return

