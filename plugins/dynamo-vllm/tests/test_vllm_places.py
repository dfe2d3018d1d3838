"""What stands for an image in vLLM's prompt is told to frontends, where that is all that vLLM changed."""

from __future__ import annotations

from typing import Any

from dynamo_core.types import Request
from dynamo_vllm.images import places_of

PICTURE = 7


def asked(token_ids: list[int]) -> Request:
    media: list[dict[str, Any]] = [{"digest": f"{at}", "start": at} for at, token in enumerate(token_ids) if token == PICTURE]
    return Request(id="r", model="m", token_ids=token_ids, media=media)


def test_each_image_has_its_runs_of_tokens() -> None:
    prompt = [1, 2, 70, 7, 7, 71, 3, 70, 7, 7, 7, 71]
    assert places_of(asked([1, 2, PICTURE, 3, PICTURE]), prompt, [(7, 5), (2, 4)]) == [[70, 1, 7, 2, 71, 1], [70, 1, 7, 3, 71, 1]]


def test_images_side_by_side_are_told_apart() -> None:
    assert places_of(asked([PICTURE, PICTURE]), [7, 7, 7], [(0, 1), (1, 2)]) == [[7, 1], [7, 2]]


def test_nothing_is_told_of_a_prompt_that_vllm_changed_in_other_places_too() -> None:
    for prompt, images in (
        ([0, 1, 7, 7, 2], [(2, 2)]),  # something stands before it now
        ([1, 7, 7, 2, 2], [(1, 2)]),  # and after it
        ([1, 2], []),  # there is no image in it
        ([1, 7, 7, 2], [(1, 1), (2, 1)]),  # there are two
    ):
        assert places_of(asked([1, PICTURE, 2]), prompt, images) is None
