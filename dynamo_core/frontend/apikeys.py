"""`authenticator = { use = "api-keys", file = ... }`: who calls is known by a key that `dynamo keys new` made."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import attrs
from attrs import validators as v

from dynamo_core.errors import ConfigError, Unauthorized
from dynamo_core.frontend.contract import Principal, bearer
from dynamo_core.frontend.keyfile import Keyring, read

log = logging.getLogger(__name__)


@attrs.define(eq=False)
class ApiKeys:
    """API keys from a file that holds their hashes. A key that was added or revoked counts without a restart."""

    file: Path
    """Made and changed by `dynamo keys`."""
    look_every: float = attrs.field(default=1.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds between two looks at the file: how long a revoked key may still count."""

    _keys: Keyring = attrs.field(init=False, repr=False)
    _stamp: tuple[int, int, int] = attrs.field(init=False, repr=False)
    _looked: float = attrs.field(init=False, repr=False)
    _problem: str | None = attrs.field(init=False, default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        """:raises ConfigError: the file cannot be used: nobody should learn of it by the first request."""
        self._stamp, self._keys, self._looked = _stamp(self.file), Keyring(read(self.file)), time.monotonic()

    async def authenticate(self, headers: Mapping[str, str]) -> Principal:
        if (now := time.monotonic()) - self._looked >= self.look_every:
            self._looked = now
            self._look()
        if not (key := bearer(headers)):
            raise Unauthorized("an API key is needed: send it as `Authorization: Bearer KEY`")
        if (record := self._keys.find(key, time.time())) is None:
            raise Unauthorized("this API key is not valid here")
        return Principal(record.tenant, record.id, record.admin)

    def _look(self) -> None:
        """Read the file when it has changed. One that cannot be read changes nothing: the keys of before stay valid."""
        try:
            if (stamp := _stamp(self.file)) == self._stamp:
                return
            self._keys, self._stamp = Keyring(read(self.file)), stamp
        except ConfigError as e:
            if str(e) != self._problem:
                log.error("the file of API keys cannot be read, its former keys stay valid: %s", e)
            self._problem = str(e)
            return
        self._problem = None
        log.info("read %d API keys", len(self._keys))


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return (0, 0, 0)
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
