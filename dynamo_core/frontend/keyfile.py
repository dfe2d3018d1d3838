"""API keys at rest: a file that knows keys by their hashes, and nothing from which a key could be made.

A key is `dk_ID_SECRET`: a public id of 8 hexadecimal digits, and 256 random bits. The file holds SHA-256 over the file's salt, the id and
the secret. A slow hash is for passwords that people choose: nobody can search 256 random bits, and one that takes
milliseconds would be a gift to whoever floods a server with wrong keys.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Generator
from pathlib import Path

import msgspec

from dynamo_core.errors import ConfigError, Problem

_KEY = re.compile(r"dk_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}")


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    id: str
    tenant: str
    hash: str
    """SHA-256, hexadecimal."""
    created: int
    """Unix time."""
    note: str = ""
    admin: bool = False
    expires: int | None = None
    """Unix time from which on it is refused."""


class KeyFile(msgspec.Struct, frozen=True, kw_only=True):
    """The content of one file."""

    salt: str
    keys: tuple[KeyRecord, ...] = ()
    version: int = 1


class Keyring:
    """The keys of one file, ready to be asked."""

    def __init__(self, file: KeyFile) -> None:
        self._salt = file.salt
        self._by_id = {record.id: record for record in file.keys}

    def __len__(self) -> int:
        return len(self._by_id)

    def find(self, key: str, now: float) -> KeyRecord | None:
        """The record of a valid key. How long it takes says nothing about how much of a key was right."""
        matched = _KEY.fullmatch(key)
        id, secret = (matched[1], matched[2]) if matched else ("", "")
        record = self._by_id.get(id)
        known = record.hash if record else "0" * 64
        if not hmac.compare_digest(hash_of(self._salt, id, secret), known) or record is None:
            return None
        return None if record.expires is not None and record.expires <= now else record


def hash_of(salt: str, id: str, secret: str) -> str:
    return hashlib.sha256(f"{salt}:{id}:{secret}".encode()).hexdigest()


def read(path: Path) -> KeyFile:
    """:raises ConfigError: it is missing, unreadable or no key file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=KeyFile)
    except FileNotFoundError:
        raise ConfigError(Problem("there is no such file of API keys", str(path), remedy=f"make a key: dynamo keys new --file {path} TENANT")) from None
    except (OSError, msgspec.MsgspecError) as e:
        raise ConfigError(Problem(f"this is no file of API keys: {e}", str(path))) from e


def add(path: Path, tenant: str, *, note: str = "", admin: bool = False, days: float | None = None) -> tuple[str, KeyRecord]:
    """Make a key. Returns the key, which is nowhere else, and its record. :raises ConfigError: the tenant's name, or the file, is no good."""
    if not _TENANT.fullmatch(tenant):
        raise ConfigError(Problem(f"{tenant!r} is no name of a tenant", remedy="letters, digits and . _ : @ -, at most 64"))
    with _changing(path) as held:
        file = read(path) if path.exists() else KeyFile(salt=secrets.token_hex(16))
        id, secret, now = secrets.token_hex(4), secrets.token_urlsafe(32), int(time.time())
        while any(record.id == id for record in file.keys):
            id = secrets.token_hex(4)
        expires = None if days is None else now + int(days * 86400)
        record = KeyRecord(id=id, tenant=tenant, hash=hash_of(file.salt, id, secret), created=now, note=note, admin=admin, expires=expires)
        held(msgspec.structs.replace(file, keys=(*file.keys, record)))
    return f"dk_{id}_{secret}", record


def revoke(path: Path, id: str) -> KeyRecord:
    """Forget a key by its id, or by the key itself. :raises ConfigError: there is none."""
    wanted = matched[1] if (matched := _KEY.fullmatch(id)) else id.removeprefix("dk_")
    with _changing(path) as held:
        file = read(path)
        record = next((record for record in file.keys if record.id == wanted), None)
        if record is None:
            raise ConfigError(Problem(f"there is no key {wanted!r}", str(path), remedy=f"dynamo keys list --file {path}"))
        held(msgspec.structs.replace(file, keys=tuple(other for other in file.keys if other is not record)))
    return record


@contextlib.contextmanager
def _changing(path: Path) -> Generator[_Write]:
    """One change at a time, by whomever; readers see the file before or after it, whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield _Write(path)
    except OSError as e:
        raise ConfigError(Problem(f"the file of API keys cannot be changed: {e.strerror or e}", str(path))) from e


class _Write:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, file: KeyFile) -> None:
        new = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as out:
            out.write(msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(new, self._path)
