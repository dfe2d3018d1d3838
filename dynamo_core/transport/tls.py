"""TLS between the processes of a fleet. Certificates that were renewed on disk are used from the next connection on."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from dynamo_core.errors import ConfigError, Problem

log = logging.getLogger(__name__)


@attrs.frozen
class PlaneTls:
    """One identity per process, shown in both directions: a worker to its callers, and a caller to workers that ask for it."""

    ca: Path
    """Who signed the certificates of the fleet."""
    cert: Path | None = None
    """This process's certificate (with its chain). Workers need one; callers only where `require_client_cert` is on."""
    key: Path | None = None
    """Its private key, unencrypted."""
    require_client_cert: bool = False
    """Callers must show a certificate that `ca` signed (mTLS)."""
    server_name: str | None = None
    """The name that every worker's certificate carries, where addresses are bare IP addresses that certificates do not list."""


def client_context(tls: PlaneTls) -> ssl.SSLContext:
    """For one connection, from the files as they are now. :raises ConfigError: they cannot be used."""
    return _context(tls, ssl.PROTOCOL_TLS_CLIENT)


def server_context(tls: PlaneTls) -> ssl.SSLContext:
    """For a listener: each handshake uses the files as they are then. :raises ConfigError: they cannot be used now."""
    if tls.cert is None:
        raise ConfigError(Problem("tls: a process that serves needs `cert` and `key`"))
    return renewing([path for path in (tls.ca, tls.cert, tls.key) if path], lambda: _context(tls, ssl.PROTOCOL_TLS_SERVER))


def renewing(files: Sequence[Path], make: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """A listener's context that `make` makes again for the next handshake after a file has changed. New files that cannot be used change nothing.

    :raises ConfigError: they cannot be used now.
    """
    state = _state(files)
    current = context = make()

    def renew(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        nonlocal state, current
        try:
            if (now := _state(files)) != state:
                current, state = make(), now
        except (ConfigError, OSError) as e:
            log.warning("renewed tls files cannot be used, the old ones stay: %s", e)
        connection.context = current

    context.sni_callback = renew
    return context


def _context(tls: PlaneTls, protocol: int) -> ssl.SSLContext:
    if (tls.cert is None) != (tls.key is None):
        raise ConfigError(Problem("tls: `cert` and `key` belong together, and only one of them is set"))
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(tls.ca)
        if tls.cert is not None:
            context.load_cert_chain(tls.cert, tls.key)
    except (OSError, ssl.SSLError) as e:
        raise ConfigError(Problem(f"tls: {', '.join(str(path) for path in (tls.ca, tls.cert, tls.key) if path)}: {getattr(e, 'reason', None) or e.strerror}",
                                  remedy="ca, cert and key are PEM files, and the key is that of cert, not encrypted")) from e
    if protocol == ssl.PROTOCOL_TLS_SERVER and tls.require_client_cert:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _state(files: Sequence[Path]) -> tuple[int, ...]:
    """Changes when a file does."""
    try:
        return tuple(path.stat().st_mtime_ns for path in files)
    except OSError as e:
        raise ConfigError(Problem(f"tls: {e.filename}: {e.strerror}")) from e
