"""Prompts with images, as engines see them.

In a request one token stands for an image; an engine puts many in its place, and it alone knows how many. What engines have told of an image is remembered,
so that the next prompt with it, such as the next turn of a conversation, is routed by the blocks that it has in the engine's cache, and is counted right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from dynamo_core.types import Request

_REMEMBERED = 10_000
"""Images; those that were told of first are forgotten first."""

Runs = Sequence[int]
"""Token, how often, next token, how often, ..."""


class Places:
    """What the engines of one model have told."""

    def __init__(self) -> None:
        self._runs: dict[str, list[int]] = {}

    def learn(self, request: Request, places: Sequence[list[int]]) -> None:
        for item, runs in zip(request.media or (), places, strict=False):
            if (digest := item.get("digest")) is not None and not len(runs) % 2:
                self._runs.pop(digest, None)
                self._runs[digest] = runs
                if len(self._runs) > _REMEMBERED:
                    del self._runs[next(iter(self._runs))]

    def applied(self, request: Request) -> Request:
        """The request, with what is known of its images."""
        known = self._runs
        if not request.media or not any(item.get("digest") in known for item in request.media):
            return request
        media = [{**item, "runs": known[item["digest"]]} if item.get("digest") in known else item for item in request.media]
        return msgspec.structs.replace(request, media=media)


def extra_tokens(places: Sequence[Runs | None]) -> int:
    """By how much a prompt is longer than it looks."""
    return sum(sum(runs[1::2]) - 1 for runs in places if runs)


def as_engines_see(token_ids: list[int], media: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[dict[str, Any]]]:
    """The prompt with images in their places, as far as they are known, and where each is: up to the first of which nothing is known."""
    tokens: list[int] = []
    where: list[dict[str, Any]] = []
    done, known = 0, True
    for item in media:
        start: int = item.get("start", 0)
        runs: Runs = item.get("runs") or ()
        known = known and bool(runs) and start >= done
        if known:
            tokens += token_ids[done:start]
            at, done = len(tokens), start + 1
            for token, count in zip(runs[::2], runs[1::2], strict=True):
                tokens += [token] * count
            where.append({"digest": item.get("digest"), "start": at, "length": len(tokens) - at})
        else:
            shifted = {"start": start + len(tokens) - done} if "start" in item else {}
            where.append({key: item[key] for key in ("digest", "start", "length") if key in item} | shifted)
    return tokens + token_ids[done:], where
