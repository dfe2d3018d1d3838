"""Images of a request, from their bytes to what vLLM takes."""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from dynamo_core.errors import RequestError
from dynamo_core.types import Request

MEDIA = "media:"
"""Before the digest of an image wherever vLLM names it, so that it is not taken for a salt."""
MAX_PIXELS = 64_000_000
"""A small file can hold an image that fills the memory."""


def opened(item: Mapping[str, Any]) -> Any:
    """Decoded and in RGB. Takes time; call it off the event loop. :raises RequestError: it is no image, or has too many pixels."""
    image_module: Any = importlib.import_module("PIL.Image")  # comes with vLLM
    if item.get("type") != "image" or not isinstance(item.get("data"), bytes):
        raise RequestError("vLLM takes images, as bytes", param="messages")
    try:
        image = image_module.open(io.BytesIO(item["data"]), formats=("PNG", "JPEG", "GIF", "WEBP", "BMP"))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise RequestError(f"an image of {width} x {height} pixels is more than {MAX_PIXELS} pixels", param="messages")
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as e:
        raise RequestError(f"an image cannot be decoded: {e}", param="messages") from e


def places_of(request: Request, prompt: Sequence[int], images: Sequence[tuple[int, int]]) -> list[list[int]] | None:
    """What stands in vLLM's prompt for the one token of each image, as `Output.places` has it; `None` where it is not just that.

    :param images: first token and length of each in `prompt`, in any order.
    """
    media = request.media or []
    found: list[list[int]] = []
    asked = told = 0
    for item, (at, length) in zip(media, sorted(images), strict=False):
        start = item.get("start", 0)
        if list(prompt[told:at]) != request.token_ids[asked:start]:
            return None
        found.append([number for token, run in groupby(prompt[at : at + length]) for number in (token, len(list(run)))])
        asked, told = start + 1, at + length
    return found if len(images) == len(media) and list(prompt[told:]) == request.token_ids[asked:] else None
