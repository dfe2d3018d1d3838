"""Whoever reads the discovery stream from its remains knows what those know who read every message when it came."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.discovery.contract import Delete, Put
from dynamo_nats import ledger
from dynamo_nats.ledger import Ledger, token

KEYS = ("a", "a/b", "ü?".encode().hex())
LEASES = (1, 2, 3)
STEP = st.one_of(
    st.tuples(st.just("k"), st.sampled_from(KEYS), st.sampled_from((0, *LEASES)), st.binary(max_size=2)),
    st.tuples(st.just("d"), st.sampled_from(KEYS)),
    st.tuples(st.just("beat"), st.sampled_from(LEASES)),
    st.tuples(st.just("end"), st.sampled_from(LEASES)),
    st.tuples(st.just("sweep")),
)


class Stream:
    """The last message of each subject, as JetStream keeps them, and its rule for heartbeats."""

    def __init__(self) -> None:
        self.last = 0
        self.kept: dict[str, tuple[int, bytes]] = {}
        self.ended: set[int] = set()

    def write(self, tokens: str, value: bytes) -> int:
        self.last += 1
        self.kept[tokens] = self.last, value
        return self.last

    def remove(self, sequence: int) -> None:
        self.kept = {tokens: kept for tokens, kept in self.kept.items() if kept[0] != sequence}

    def read_anew(self) -> dict[str, Put]:
        reader = Ledger(lambda _: None, lambda _: None)
        reader.begin()
        for tokens, (number, value) in sorted(self.kept.items(), key=lambda item: item[1][0]):
            reader.read(tokens, value, number)
        present, _ = reader.finish()
        return {key: record.put for key, record in present.items()}


@settings(max_examples=100, deadline=None)
@given(st.lists(STEP, max_size=40), st.integers(min_value=0, max_value=2))
def test_the_remains_of_the_stream_mean_what_the_stream_meant(steps, sweeps) -> None:
    async def run() -> None:
        stream, told = Stream(), dict[str, Put]()

        def changed(change: Put | Delete) -> None:
            if isinstance(change, Put):
                told[change.key] = change
            else:
                del told[change.key]

        live = Ledger(changed, lambda _: None)
        live.begin()
        live.finish()
        for step in (*(("beat", lease) for lease in LEASES), *steps):  # nobody writes under a lease before it is there
            match step:
                case ("k", key, lease, value):
                    tokens = f"k.{token(key)}.{lease:x}"
                case ("d", key):
                    tokens, value = f"d.{token(key)}", b""
                case ("beat", lease):
                    if lease in stream.ended:  # the servers refuse it
                        continue
                    tokens, value = f"l.{lease:x}", b'{"ttl": 1}'
                case ("end", lease):
                    if lease in stream.ended:  # the same
                        continue
                    stream.ended.add(lease)
                    tokens, value = f"l.{lease:x}", b""
                case _:
                    sweep(live, stream)
                    continue
            live.read(tokens, value, stream.write(tokens, value))
            for sequence in live.garbage():
                stream.remove(sequence)
            assert stream.read_anew() == told == {key: record.put for key, record in live.records.items()}
        for _ in range(sweeps):
            sweep(live, stream)
            assert stream.read_anew() == told

    asyncio.run(run())


def sweep(live: Ledger, stream: Stream) -> None:
    for _, sequence in sorted(live._garbage):
        stream.remove(sequence)
    live._garbage.clear()


async def test_what_means_nothing_any_more_is_removed_after_a_while(monkeypatch) -> None:
    monkeypatch.setattr(ledger, "GARBAGE", 0.02)
    stream, live = Stream(), Ledger(lambda _: None, lambda _: None)
    live.begin()
    live.finish()
    for tokens, value in (("l.1", b'{"ttl": 1}'), (f"k.{token('a')}.1", b"1"), (f"k.{token('b')}.0", b"2"), (f"d.{token('b')}", b""), ("l.1", b""), ("b.me", b"")):
        live.read(tokens, value, stream.write(tokens, value))
    async with asyncio.timeout(20):
        while stream.kept:
            await asyncio.sleep(0.02)
            for sequence in live.garbage():
                stream.remove(sequence)


async def test_a_message_that_is_none_is_an_error_and_changes_nothing() -> None:
    live = Ledger(lambda _: None, lambda _: None)
    for tokens, value in (("k.%%%.1", b""), ("k.YQ.zz", b""), ("l.xyz", b"{}"), ("l.1", b"{"), ("l.1", b"[]")):
        with pytest.raises(ValueError):
            live.read(tokens, value, 1)
    assert not live.records
    assert not live.leases
