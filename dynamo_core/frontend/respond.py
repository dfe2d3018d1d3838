"""Small whole JSON responses, in raw ASGI."""

from __future__ import annotations

from starlette.types import Send

from dynamo_core.frontend.failure import Header


async def respond(send: Send, status: int, body: bytes, headers: list[Header]) -> None:
    await send(
        {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]}
    )
    await send({"type": "http.response.body", "body": body, "more_body": False})
