"""Prompts with images, as routers see them: with what engines have told of each image in its place."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.kv.hashing import Hasher, content_of
from dynamo_core.pipeline.dispatch import routing_request
from dynamo_core.pipeline.places import Places, as_engines_see, extra_tokens
from dynamo_core.types import Output, Request

PICTURE = 7


def request(token_ids: list[int], *digests: str) -> Request:
    """As the frontend makes it: from the place of an image on, everything depends on it."""
    starts = [at for at, token in enumerate(token_ids) if token == PICTURE]
    media = [{"digest": digest, "start": start, "length": len(token_ids) - start, "data": b"pixels"} for digest, start in zip(digests, starts, strict=True)]
    return Request(id="r", model="m", token_ids=token_ids, media=media)


def test_an_image_that_an_engine_has_told_of_stands_in_its_place_with_all_its_tokens() -> None:
    places = Places()
    places.learn(request([1, PICTURE, 2], "a"), [[70, 1, 7, 3, 71, 1]])
    asked = routing_request(places.applied(request([5, 5, PICTURE, 6, PICTURE, 8], "a", "a")))
    assert asked.token_ids == [5, 5, 70, 7, 7, 7, 71, 6, 70, 7, 7, 7, 71, 8]
    assert asked.prompt_tokens == 14
    assert asked.media == [{"digest": "a", "start": 2, "length": 5}, {"digest": "a", "start": 8, "length": 5}]


def test_from_the_first_unknown_image_on_everything_depends_on_it() -> None:
    places = Places()
    places.learn(request([PICTURE], "a"), [[7, 4]])
    asked = routing_request(places.applied(request([5, PICTURE, 6, PICTURE, 8, PICTURE, 9], "a", "new", "a")))
    assert asked.token_ids == [5, 7, 7, 7, 7, 6, PICTURE, 8, PICTURE, 9]
    assert asked.media == [{"digest": "a", "start": 1, "length": 4}, {"digest": "new", "start": 6, "length": 4}, {"digest": "a", "start": 8, "length": 2}]
    assert all("data" not in item for item in asked.media)


def test_a_prompt_without_places_for_its_images_is_left_as_it_is() -> None:
    media: list[dict[str, Any]] = [{"digest": "a", "start": 0, "length": 3, "runs": [7, 2]}, {"digest": "b", "start": 0, "length": 3, "runs": [7, 2]}]
    tokens, where = as_engines_see([1, 2, 3], media)
    assert tokens == [7, 7, 2, 3], "the first may stand there"
    assert where[1] == {"digest": "b", "start": 1, "length": 3}, "and of the second it is not known where"


def test_what_is_known_counts_as_part_of_the_prompt() -> None:
    assert extra_tokens([[7, 64, 8, 1], None, [7, 2]]) == 64 + 1
    assert extra_tokens([]) == 0


def test_what_was_told_last_counts_and_nonsense_is_not_kept() -> None:
    places = Places()
    places.learn(request([PICTURE], "a"), [[7, 4]])
    places.learn(request([PICTURE], "a"), [[7, 6]])
    places.learn(request([PICTURE], "b"), [[7]])
    assert [item.get("runs") for item in places.applied(request([PICTURE, PICTURE], "a", "b")).media or ()] == [[7, 6], None]


def test_requests_without_known_images_are_not_touched() -> None:
    places = Places()
    for untouched in (Request(id="r", model="m", token_ids=[1, 2]), request([1, PICTURE], "a")):
        assert places.applied(untouched) is untouched


def test_places_travel_with_outputs() -> None:
    output = Output([1], cached_tokens=3, places=[[7, 4], [8, 1]])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(output), type=Output) == output


@given(st.lists(st.one_of(st.integers(10, 20), st.sampled_from(["a", "b", "c"])), max_size=60), st.integers(1, 9))
def test_the_keys_of_blocks_are_those_of_the_engine_however_images_lie(parts: list[Any], size: int) -> None:
    runs = {"a": [30, 1, 7, 5, 31, 1], "b": [7, 1], "c": [32, 2, 7, 9]}
    spread = {digest: [token for token, count in zip(run[::2], run[1::2], strict=True) for _ in range(count)] for digest, run in runs.items()}
    places = Places()
    places.learn(request([PICTURE] * 3, *runs), list(runs.values()))
    asked = routing_request(places.applied(request([PICTURE if isinstance(part, str) else part for part in parts], *(p for p in parts if isinstance(p, str)))))

    engine: list[int] = []
    reaches: list[tuple[int, int, str]] = []
    for part in parts:
        if isinstance(part, str):
            reaches.append((len(engine), len(engine) + len(spread[part]), part))
            engine += spread[part]
        else:
            engine.append(part)
    hasher = Hasher(b"secret", size)
    media = [{"digest": digest, "start": start, "length": end - start} for start, end, digest in reaches]
    assert hasher.keys(list(asked.token_ids), 0, content_of(asked.media, size)).tolist() == hasher.keys(engine, 0, content_of(media, size)).tolist()
