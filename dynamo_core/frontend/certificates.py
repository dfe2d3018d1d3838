"""Whether the files of `[frontend.tls]` can be used, before a server is started with them."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

from dynamo_core.config.schema import Tls
from dynamo_core.errors import Problem

_REMEDIES = {"KEY_VALUES_MISMATCH": "the key is that of another certificate"}


def unusable(tls: Tls) -> Iterator[Problem]:
    """What is wrong with them, file by file; nothing when a server can use them."""
    unread = [problem for name, path in (("cert", tls.cert), ("key", tls.key), ("client_ca", tls.client_ca)) if path and (problem := _unread(name, path))]
    if unread:
        yield from unread
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls.cert, tls.key, password=_nobody_to_ask)
    except (ssl.SSLError, _Encrypted) as e:
        reason = getattr(e, "reason", None) or str(e)
        remedy = _REMEDIES.get(reason, "both are PEM files, and the key is not encrypted")
        yield Problem(f"frontend.tls: {tls.cert} and {tls.key} are not a certificate and its private key: {reason}", remedy=remedy)
    if tls.client_ca is not None:
        try:
            context.load_verify_locations(tls.client_ca)
        except ssl.SSLError as e:
            yield Problem(f"frontend.tls.client_ca: {tls.client_ca} holds no certificates: {e.reason}", remedy="it is a PEM file")


class _Encrypted(Exception):
    """A private key with a password, which OpenSSL would ask for at the terminal."""


def _nobody_to_ask() -> str:
    raise _Encrypted("the key is encrypted")


def _unread(name: str, path: Path) -> Problem | None:
    try:
        path.read_bytes()
    except OSError as e:
        return Problem(f"frontend.tls.{name}: the file {path} cannot be read: {e.strerror}")
    return None
