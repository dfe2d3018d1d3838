"""The blocking half of `FileDiscovery`: files in, changes out. Used by one thread at a time.

    <path>/keys/     one file for each pair of key and lease (see `record`), moved into place whole
    <path>/leases/   one file for each lease, named by its id in hex; the owner touches it, and deleting it ends the lease
    <path>/tmp/      files on their way into place

A record counts while its lease file exists and moves. Every reader judges that by itself: a lease is dead once its file has
not changed for `ttl` seconds of the reader's own monotonic clock, so that wall clocks, their jumps and their differences decide nothing.
Whoever finds a lease dead deletes its file, which nobody ever creates again; then what is left of its records is swept.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import msgspec

from dynamo_core.discovery.contract import LEASE_TTL, Delete, Put
from dynamo_core.discovery.record import Record, decode, encode, file_name, stem
from dynamo_core.errors import LeaseLost

_SETTLE = 0.1
"""Seconds after which a directory's modification time must have moved on: changes within one tick of it are found by looking again."""
_LOOK_AT_LEASES = 0.5
_LOOK_AT_ALL = 2.0
"""Seconds between full looks, for file systems whose directory times cannot be trusted."""
_LITTER = 3600.0
"""Seconds after which a file in `tmp` belongs to a writer that died."""

log = logging.getLogger(__name__)


class _LeaseFile(msgspec.Struct, frozen=True):
    ttl: float


@attrs.frozen(eq=False)
class _File:
    """A file in `keys` as it was when it was read: its record, or why there is none."""

    stamp: tuple[int, int, int] | None
    record: Record | None
    fault: str = ""


@attrs.define
class _Seen:
    """What this reader knows of a lease."""

    ttl: float
    beat: int
    """Modification time of the file. Only whether it changes matters."""
    since: float
    """When it was last seen to change, by our monotonic clock."""
    suspect: bool
    """Old when first seen, so its owner is probably long dead: hidden until it moves."""


class Directory:
    def __init__(self, path: Path, *, monotonic: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._keys, self._leases, self._tmp = path / "keys", path / "leases", path / "tmp"
        self._monotonic, self._wall = monotonic, wall
        self.faults: tuple[str, ...] = ()
        """The files that hold no readable record, and why. Replaced, never changed, so that another thread may read it."""
        self._files: dict[str, _File] = {}
        self._seen: dict[int, _Seen] = {}
        self._dead: set[int] = set()
        self._visible: dict[str, _File] = {}
        self._stamp = -1
        self._stamp_seen = self._looked_at_all = self._looked_at_leases = float("-inf")
        self._settled = False
        self._last_stamp = 0

    # ------------------------------------------------------------------ writing

    def create(self) -> None:
        """Make the directories, and clear what writers left that died long ago."""
        for folder in (self._keys, self._leases, self._tmp):
            folder.mkdir(parents=True, exist_ok=True)
        with os.scandir(self._tmp) as entries:
            for entry in entries:
                try:
                    if self._wall() - entry.stat().st_mtime > _LITTER:
                        _unlink(entry.path)
                except FileNotFoundError:
                    continue

    def begin_lease(self, lease: int, ttl: float) -> None:
        self.create()
        self._place(self._leases / f"{lease:x}", msgspec.json.encode(_LeaseFile(ttl)))

    def beat(self, lease: int) -> bool:
        """Touch the lease file. False: the lease is gone."""
        stamp = self._next_stamp()
        try:
            os.utime(self._leases / f"{lease:x}", ns=(stamp, stamp))
        except FileNotFoundError:
            self._leases.stat()
            return False
        return True

    def end_lease(self, lease: int) -> None:
        """Delete the lease and then its records."""
        _unlink(self._leases / f"{lease:x}")
        ending = f"={lease:x}"
        for name in os.listdir(self._keys):
            if name.endswith(ending):
                _unlink(self._keys / name)

    def write(self, key: str, value: bytes, lease: int | None) -> None:
        """Put a record in place of all earlier ones of its key. :raises LeaseLost: the lease is gone."""
        target = self._keys / file_name(key, lease)
        others = [name for name in self._names(key) if name != target.name]
        self._check(key, lease)
        self._place(target, encode(key, value))
        try:
            self._check(key, lease)
        except LeaseLost:
            _unlink(target)
            raise
        for name in others:
            _unlink(self._keys / name)

    def remove(self, key: str) -> None:
        for name in self._names(key):
            _unlink(self._keys / name)

    def try_to_write(self) -> None:
        """Write a small file and delete it. :raises OSError: that is not possible."""
        probe = self._tmp / secrets.token_hex(12)
        self._place(probe, bytes(4096))
        _unlink(probe)

    def _names(self, key: str) -> list[str]:
        wanted = stem(key)
        return [name for name in os.listdir(self._keys) if name.rpartition("=")[0] == wanted]

    def _check(self, key: str, lease: int | None) -> None:
        if lease is None:
            return
        if lease not in self._dead:
            try:
                os.stat(self._leases / f"{lease:x}")
                return
            except FileNotFoundError:
                self._leases.stat()
        raise LeaseLost(f"lease {lease:x} is gone, so {key!r} was not written under it")

    def _place(self, target: Path, content: bytes) -> None:
        """Write a whole file or none. Its modification time is unique, so that readers see every replacement."""
        temporary = self._tmp / secrets.token_hex(12)
        try:
            temporary.write_bytes(content)
            stamp = self._next_stamp()
            os.utime(temporary, ns=(stamp, stamp))
            os.replace(temporary, target)
        except BaseException:
            _unlink(temporary)
            raise

    def _next_stamp(self) -> int:
        self._last_stamp = max(self._last_stamp + 1, int(self._wall() * 1e9))
        return self._last_stamp

    # ------------------------------------------------------------------ reading

    def refresh(self, *, thorough: bool = False) -> list[Put | Delete]:
        """What changed since the last call: deletions, then puts in the order in which they were written.

        Cheap when nothing happens: one `stat`, and one for each lease twice a second. `thorough` looks at every file.
        """
        now = self._monotonic()
        changed = False
        if self._must_look(now) or thorough:
            changed = self._read_records()
            self._looked_at_all = now
        if changed or thorough or now - self._looked_at_leases >= _LOOK_AT_LEASES:
            # After the records: a lease exists before its first record, so a record without one is an orphan.
            changed = self._read_leases(now) or changed
            self._looked_at_leases = now
        if not changed:
            return []
        changes = self._difference()
        self._sweep()
        return changes

    def _must_look(self, now: float) -> bool:
        stamp = os.stat(self._keys).st_mtime_ns
        if stamp != self._stamp:
            self._stamp, self._stamp_seen, self._settled = stamp, now, False
            return True
        if not self._settled:
            self._settled = now - self._stamp_seen > _SETTLE
            return True
        return now - self._looked_at_all >= _LOOK_AT_ALL

    def _read_records(self) -> bool:
        files: dict[str, _File] = {}
        changed = False
        with os.scandir(self._keys) as entries:
            for entry in entries:
                file = self._files.get(entry.name)
                try:
                    if file is None or file.stamp != _stamp(entry.stat(follow_symlinks=False)):
                        file = self._read_record(entry.name, file)
                        changed = True
                except FileNotFoundError:
                    continue
                files[entry.name] = file
        changed = changed or len(files) != len(self._files)
        self._files = files
        if changed:
            self.faults = tuple(f"{name}: {file.fault}" for name, file in files.items() if file.fault)
        return changed

    def _read_record(self, name: str, before: _File | None) -> _File:
        path = self._keys / name
        stamp = None
        try:
            with path.open("rb") as content:
                stamp = _stamp(os.fstat(content.fileno()))
                return _File(stamp, decode(name, content.read()))
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as e:
            fault = e.strerror or str(e) if isinstance(e, OSError) else str(e)
            if before is None or before.fault != fault:
                log.warning("skipped an unreadable discovery record", extra={"path": str(path), "because": fault})
            return _File(stamp, None, fault)

    def _read_leases(self, now: float) -> bool:
        changed = False
        present: set[int] = set()
        with os.scandir(self._leases) as entries:
            for entry in entries:
                try:
                    lease, beat = int(entry.name, 16), entry.stat().st_mtime_ns
                    present.add(lease)
                    if lease not in self._dead:
                        changed = self._judge(lease, beat, now) or changed
                except (FileNotFoundError, ValueError):
                    continue
        for lease in self._seen.keys() - present:
            del self._seen[lease]
            changed = True
        self._dead &= present
        return changed

    def _judge(self, lease: int, beat: int, now: float) -> bool:
        """Whether what this lease protects appears or disappears now."""
        seen = self._seen.get(lease)
        if seen is None:
            ttl = _ttl((self._leases / f"{lease:x}").read_bytes())
            self._seen[lease] = _Seen(ttl, beat, now, suspect=self._wall() - beat / 1e9 > ttl)
            return True
        if seen.beat != beat:
            seen.beat, seen.since = beat, now
            appears, seen.suspect = seen.suspect, False
            return appears
        if now - seen.since > seen.ttl:
            del self._seen[lease]
            self._dead.add(lease)
            return True
        return False

    def _difference(self) -> list[Put | Delete]:
        best: dict[str, _File] = {}
        for file in self._files.values():
            record = file.record
            if record is None or not self._counts(record):
                continue
            other = best.get(record.key)
            if other is None or _rank(file) > _rank(other):
                best[record.key] = file
        changes: list[Put | Delete] = [Delete(key) for key in self._visible if key not in best]
        fresh = [file for key, file in best.items() if self._visible.get(key) is not file]
        changes += [Put(r.key, r.value, r.lease) for r in (file.record for file in sorted(fresh, key=_rank)) if r]
        self._visible = best
        return changes

    def _counts(self, record: Record) -> bool:
        if record.lease is None:
            return True
        seen = self._seen.get(record.lease)
        return seen is not None and not seen.suspect

    def _sweep(self) -> None:
        """Delete dead leases, then the records of leases that are no more. What cannot be deleted stays hidden all the same."""
        kept = {lease for lease in self._dead if not _unlink_if_allowed(self._leases / f"{lease:x}")}
        for name, file in self._files.items():
            lease = file.record.lease if file.record else None
            if lease is not None and lease not in self._seen and lease not in kept:
                _unlink_if_allowed(self._keys / name)


def _ttl(lease_file: bytes) -> float:
    try:
        return msgspec.json.decode(lease_file, type=_LeaseFile).ttl
    except msgspec.DecodeError:
        return LEASE_TTL


def _stamp(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _rank(file: _File) -> tuple[int, int]:
    """The latest record of a key wins; of two in the same nanosecond, all readers choose alike."""
    return (file.stamp[1] if file.stamp else 0), (file.record.lease or 0) if file.record else 0


def _unlink(path: Path | str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _unlink_if_allowed(path: Path) -> bool:
    """Whether the file is gone."""
    try:
        _unlink(path)
    except OSError:
        return False
    return True
