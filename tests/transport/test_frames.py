"""Frames survive any chunking, and what is not a frame is refused before it is buffered."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.errors import ProtocolViolation
from dynamo_core.transport import frames
from dynamo_core.transport.frames import HEADER, Data, End, Failure, Hello, Open, Outputs, Splitter
from dynamo_core.types import Output

stream = st.integers(1, 2**31)
outputs = st.builds(Output, st.lists(st.integers(0, 2**31), max_size=5), st.integers(0, 3), st.sampled_from([None, "stop", "length"]))
to_client = st.one_of(
    st.lists(st.tuples(stream, outputs), max_size=20).map(lambda pairs: Outputs([s for s, _ in pairs], [o for _, o in pairs])),
    st.builds(Data, stream, st.binary(max_size=2000)), st.builds(End, stream), st.builds(Failure, stream, st.text(), st.text()))


def cut(data: bytes, places: list[int]) -> list[bytes]:
    marks = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(marks)]


@given(st.lists(to_client, max_size=8), st.lists(st.integers(0, 2**20), max_size=30))
def test_frames_arrive_as_sent_however_the_bytes_are_chunked(sent: list[frames.ToClient], places: list[int]) -> None:
    splitter = Splitter(1 << 20)
    got = [frames.to_client.decode(body) for chunk in cut(b"".join(map(frames.encode, sent)), places) for body in splitter.feed(chunk)]
    assert got == sent
    assert splitter.buffered == 0


@given(st.integers(1, 50), st.binary(min_size=1, max_size=40))
def test_a_frame_over_the_limit_is_refused_by_its_length_alone(over: int, rest: bytes) -> None:
    splitter = Splitter(100)
    with pytest.raises(ProtocolViolation, match="over the limit of 100"):
        list(splitter.feed((100 + over).to_bytes(HEADER, "big") + rest))


@given(st.binary(max_size=300))
def test_garbage_either_decodes_or_is_a_decode_error(garbage: bytes) -> None:
    for decoder in (frames.to_client, frames.to_server):
        try:
            decoder.decode(garbage)
        except msgspec.DecodeError:
            pass


@pytest.mark.parametrize(("start", "guess"), [(b"\x16\x03\x01\x02", "TLS"), (b"GET /", "HTTP"), (b"\xff\xff\xff\xff", "limit")])
def test_the_refusal_guesses_who_is_talking(start: bytes, guess: str) -> None:
    with pytest.raises(ProtocolViolation, match=guess):
        list(Splitter(frames.MAX_HELLO).feed(start + b"xxxx"))


def test_a_frame_may_not_travel_the_wrong_way() -> None:
    with pytest.raises(msgspec.ValidationError):
        frames.to_server.decode(frames.encode(End(1))[HEADER:])
    with pytest.raises(msgspec.ValidationError):
        frames.to_client.decode(frames.encode(Open(1, "e", b"", "r"))[HEADER:])


def test_a_later_version_may_append_fields_to_its_hello() -> None:
    longer = msgspec.msgpack.encode([1, "dynamo", 2, 1000, 10, 5, 6, "new", {"more": True}])
    hello = frames.to_server.decode(longer)
    assert isinstance(hello, Hello)
    assert (hello.version, hello.window_bytes) == (2, 6)
