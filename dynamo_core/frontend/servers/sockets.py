"""Listening sockets, made here and not by the HTTP servers: one error text, one port report, one set of options."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Generator

BACKLOG = 2048
"""Connections that the kernel holds while the loop is busy; a burst of a thousand clients must not see a refusal."""


@contextlib.contextmanager
def reserved_port(host: str) -> Generator[int]:
    """A free port that several processes may then share by `reuse_port`; nobody else gets it until this is left."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, 0))  # bound and not listening: the kernel hands it no connection
        yield sock.getsockname()[1]


def listening(host: str, port: int, *, reuse_port: bool) -> socket.socket:
    """A bound, listening, non-blocking TCP socket. :raises OSError: with the address in the text."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, proto)
    except OSError as e:
        raise OSError(e.errno, f"cannot listen on {host}:{port}: {e.strerror or e}") from e
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Accepted sockets inherit it: an event must leave at once and not wait for the acknowledgement of the one before.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as e:
        sock.close()
        raise OSError(e.errno, f"cannot listen on {host}:{port}: {e.strerror or e}") from e
    return sock
