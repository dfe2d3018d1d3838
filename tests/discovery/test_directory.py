"""What a directory of records shows when clocks lie, owners die in the middle of a write, and files are damaged."""

from __future__ import annotations

import os

import pytest

from dynamo_core.discovery.contract import Delete, Put
from dynamo_core.discovery.directory import Directory
from dynamo_core.discovery.record import encode, file_name
from dynamo_core.errors import LeaseLost


class Clocks:
    def __init__(self):
        self.monotonic = 1000.0
        self.wall = 1_700_000_000.0

    def sleep(self, seconds):
        self.monotonic += seconds
        self.wall += seconds


@pytest.fixture
def clocks():
    return Clocks()


@pytest.fixture
def open_directory(tmp_path, clocks):
    def open_one(at=clocks):
        directory = Directory(tmp_path, monotonic=lambda: at.monotonic, wall=lambda: at.wall)
        directory.create()
        return directory

    return open_one


def test_a_lease_expires_when_its_file_did_not_change_for_ttl_by_the_readers_clock(open_directory, clocks):
    owner, reader = open_directory(), open_directory()
    owner.begin_lease(7, ttl=10)
    owner.write("k", b"v", 7)
    assert reader.refresh() == [Put("k", b"v", 7)]
    for _ in range(5):
        clocks.sleep(9)
        assert owner.beat(7)
        assert reader.refresh() == []
    clocks.sleep(10.5)
    assert reader.refresh() == [Delete("k")]
    assert not owner.beat(7)


def test_a_dead_lease_is_swept_from_disk_by_whoever_finds_it(open_directory, clocks, tmp_path):
    owner, reader = open_directory(), open_directory()
    owner.begin_lease(7, ttl=10)
    owner.write("k", b"v", 7)
    reader.refresh()
    clocks.sleep(11)
    reader.refresh()
    assert os.listdir(tmp_path / "keys") == os.listdir(tmp_path / "leases") == []


@pytest.mark.parametrize("jump", [-86400, 86400])
def test_a_clock_that_jumps_by_a_day_expires_nobody_and_keeps_nobody(open_directory, clocks, jump):
    owner, reader = open_directory(), open_directory()
    owner.begin_lease(7, ttl=10)
    owner.write("k", b"v", 7)
    reader.refresh()
    clocks.wall += jump
    clocks.sleep(3)
    assert reader.refresh() == []
    assert owner.beat(7)
    clocks.sleep(9)
    assert reader.refresh() == []
    clocks.wall += jump
    clocks.sleep(11)
    assert reader.refresh() == [Delete("k")]


@pytest.mark.parametrize("skew", [-3600, 3600])
def test_a_reader_whose_clock_is_wrong_sees_the_living_after_their_next_heartbeat(open_directory, skew):
    owner, wrong = open_directory(), Clocks()
    wrong.wall += skew
    reader = open_directory(wrong)
    owner.begin_lease(7, ttl=10)
    owner.write("k", b"v", 7)
    seen = reader.refresh()
    wrong.sleep(3.3)
    assert owner.beat(7)
    seen += reader.refresh()
    assert seen == [Put("k", b"v", 7)]


def test_who_is_long_dead_when_a_reader_starts_is_never_shown(open_directory, clocks, tmp_path):
    owner = open_directory()
    owner.begin_lease(7, ttl=10)
    owner.write("k", b"v", 7)
    clocks.sleep(60)
    reader = open_directory()
    assert reader.refresh() == []
    clocks.sleep(11)
    assert reader.refresh() == []
    assert os.listdir(tmp_path / "keys") == []


def test_an_expired_owner_cannot_write(open_directory, clocks):
    owner, reader = open_directory(), open_directory()
    owner.begin_lease(7, ttl=10)
    reader.refresh()
    clocks.sleep(11)
    reader.refresh()
    with pytest.raises(LeaseLost):
        owner.write("k", b"late", 7)
    assert reader.refresh(thorough=True) == []


def test_a_record_that_an_expired_owner_still_had_on_the_way_stays_invisible_and_hurts_no_successor(open_directory, clocks, tmp_path):
    owner, successor, reader = open_directory(), open_directory(), open_directory()
    owner.begin_lease(7, ttl=10)
    owner.write("k", b"old", 7)
    reader.refresh()
    clocks.sleep(11)
    successor.begin_lease(8, ttl=10)
    successor.write("k", b"new", 8)
    assert reader.refresh(thorough=True) == [Put("k", b"new", 8)]
    # The owner was paused between its check and its rename, for longer than its lease:
    (tmp_path / "keys" / file_name("k", 7)).write_bytes(encode("k", b"late"))
    clocks.sleep(1)
    assert reader.refresh(thorough=True) == []
    assert os.listdir(tmp_path / "keys") == [file_name("k", 8)]


def test_a_dead_lease_stays_dead_for_a_reader_that_may_not_delete_it(open_directory, clocks, monkeypatch):
    owner, reader = open_directory(), open_directory()
    owner.begin_lease(7, ttl=10)
    owner.write("k", b"v", 7)
    reader.refresh()
    clocks.sleep(11)
    monkeypatch.setattr("dynamo_core.discovery.directory._unlink_if_allowed", lambda path: False)
    assert reader.refresh() == [Delete("k")]
    assert owner.beat(7)
    clocks.sleep(1)
    owner.write("k2", b"v", 7)
    assert reader.refresh(thorough=True) == []


def test_of_two_records_of_one_key_every_reader_shows_the_later(open_directory):
    one, two = open_directory(), open_directory()
    one.begin_lease(7, ttl=10)
    two.begin_lease(8, ttl=10)
    for number in range(10):
        (one, two)[number % 2].write("k", b"%d" % number, 7 + number % 2)
        for reader in (open_directory(), open_directory()):
            assert reader.refresh() == [Put("k", b"%d" % number, 7 + number % 2)]


def test_a_replacement_within_one_tick_of_the_file_system_is_seen(open_directory, clocks):
    writer, reader = open_directory(), open_directory()
    for number in range(300):
        writer.write("k", b"%03d" % number, None)
        clocks.sleep(0.2)
        assert reader.refresh() == [Put("k", b"%03d" % number, None)]


def test_a_change_right_after_a_look_is_found_although_the_directory_time_did_not_move(open_directory, clocks, tmp_path):
    writer, reader = open_directory(), open_directory()
    writer.write("a", b"", None)
    reader.refresh()
    before = os.stat(tmp_path / "keys")
    writer.write("b", b"", None)
    os.utime(tmp_path / "keys", ns=(before.st_atime_ns, before.st_mtime_ns))
    clocks.sleep(0.15)
    assert reader.refresh() == [Put("b", b"", None)]


@pytest.mark.parametrize(
    ("content", "because"),
    [
        (b"", "no header line"),
        (b"\0" * 100, "no header line"),
        (b"{}\nvalue", "header is not readable"),
        (encode("k", b"value")[:-1], "it has 4 bytes of 5"),
        (encode("k", b"value")[:-1] + b"!", "checksum does not fit"),
        (encode("other", b"value"), "a record of 'other' under a wrong name"),
    ],
)
def test_a_damaged_record_is_named_once_and_the_others_are_served(open_directory, clocks, tmp_path, caplog, content, because):
    writer, reader = open_directory(), open_directory()
    (tmp_path / "keys" / file_name("k", None)).write_bytes(content)
    writer.write("fine", b"v", None)
    for _ in range(5):
        clocks.sleep(3)
        reader.refresh()
    assert [record.getMessage() for record in caplog.records] == ["skipped an unreadable discovery record"]
    assert because in caplog.records[0].because
    assert because in reader.faults[0]
    assert "k=0" in reader.faults[0]
    writer.write("k", b"mended", None)
    assert reader.refresh(thorough=True) == [Put("k", b"mended", None)]
    assert reader.faults == ()


def test_a_file_that_is_no_record_at_all_is_named_too(open_directory, tmp_path):
    reader = open_directory()
    (tmp_path / "keys" / "notes.txt").write_text("hello\n")
    (tmp_path / "leases" / "notes.txt").write_text("hello\n")
    assert reader.refresh() == []
    assert "notes.txt" in reader.faults[0]


def test_a_damaged_lease_file_is_a_lease_of_the_usual_length(open_directory, clocks, tmp_path):
    owner, reader = open_directory(), open_directory()
    owner.begin_lease(7, ttl=3)
    owner.write("k", b"v", 7)
    (tmp_path / "leases" / "7").write_bytes(b"\0\0\0")
    assert owner.beat(7)
    assert reader.refresh() == [Put("k", b"v", 7)]
    clocks.sleep(11)
    assert reader.refresh() == [Delete("k")]


def test_what_a_writer_left_behind_when_it_died_is_never_a_record_and_is_cleared_later(open_directory, clocks, tmp_path):
    directory = open_directory()
    litter = tmp_path / "tmp" / "half-written"
    litter.write_bytes(b"half")
    os.utime(litter, (clocks.wall, clocks.wall))
    assert directory.refresh(thorough=True) == []
    directory.create()
    assert litter.exists()
    clocks.sleep(4000)
    directory.create()
    assert not litter.exists()


def test_a_write_that_does_not_fit_leaves_the_old_record_and_no_litter(open_directory, tmp_path, monkeypatch):
    directory = open_directory()
    directory.write("k", b"old", None)
    directory.refresh()

    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        directory.write("k", b"new", None)
    assert os.listdir(tmp_path / "tmp") == []
    assert directory.refresh(thorough=True) == []
