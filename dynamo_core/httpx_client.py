"""The client for HTTP of everything here that waits for others."""

from __future__ import annotations

from typing import Any

import httpx


class HttpClient(httpx.AsyncClient):
    """Says of a connection that is lost while it is made what it says of every lost connection: `httpx.ConnectError`.

    A server that is killed in that moment leaves httpx, on uvloop, with a connection whose socket is gone already, and its question for the peer's
    name ends as an `AttributeError`. Nothing was sent by then.
    """

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        try:
            return await super().send(request, **options)
        except AttributeError as e:
            if e.obj is not None or e.name != "getpeername":
                raise
            raise httpx.ConnectError("the connection was lost while it was made", request=request) from e
