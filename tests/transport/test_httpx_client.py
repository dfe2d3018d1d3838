"""What becomes of requests to a server that hangs up."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator

import httpx
import uvloop

from dynamo_core.httpx_client import HttpClient

ROUNDS, AT_ONCE = 25, 64


@contextlib.contextmanager
def resetting() -> Iterator[str]:
    """A server that resets every connection as soon as it is there."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(512)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def test_a_connection_that_is_lost_while_it_is_made_is_a_lost_connection() -> None:
    seen: Counter[type[Exception]] = Counter()

    async def ask(client: httpx.AsyncClient, url: str) -> None:
        try:
            await client.post(url, content=b"hello")
        except Exception as e:
            seen[type(e)] += 1

    async def main(url: str) -> None:
        async with HttpClient(limits=httpx.Limits(max_connections=None), trust_env=False) as client:
            for _ in range(ROUNDS):
                await asyncio.gather(*(ask(client, url) for _ in range(AT_ONCE)))

    with resetting() as url:
        uvloop.run(main(url))
    assert seen.total() == ROUNDS * AT_ONCE
    assert all(issubclass(kind, httpx.TransportError) for kind in seen), seen
