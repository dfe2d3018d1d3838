"""Request bodies: bounded in size and in time."""

from __future__ import annotations

import asyncio

from starlette.types import Receive

from dynamo_core.errors import BodyTooLarge, BodyTooSlow, Cancelled

LINGER = 1.0
"""Seconds for which the rest of a refused body is read and thrown away: a client that is still sending reads no answer."""


async def read_body(receive: Receive, *, limit: int, timeout: float) -> bytes | bytearray:
    """:raises BodyTooLarge: as soon as it is. :raises BodyTooSlow: not complete in `timeout` seconds. :raises Cancelled: the client left."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Cancelled("the client left before its request was complete")
    first: bytes = message.get("body", b"")
    if len(first) > limit:
        raise _too_large(limit)
    if not message.get("more_body", False):
        return first
    body = bytearray(first)
    try:
        async with asyncio.timeout(timeout):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Cancelled("the client left before its request was complete")
                more: bytes = message.get("body", b"")
                if len(body) + len(more) > limit:
                    raise _too_large(limit)
                body += more
                if not message.get("more_body", False):
                    return body
    except TimeoutError:
        raise BodyTooSlow(f"the body was not complete after {timeout:g} s") from None


async def discard(receive: Receive) -> None:
    """Read the rest of the body into nothing."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limit} bytes, the limit of this server")
