"""The prefix keys of the request at hand, computed once however many providers of a decision ask."""

from __future__ import annotations

import secrets
from functools import lru_cache

from dynamo_core.kv.hashing import Hasher, Keys, content_of
from dynamo_core.routing.contract import RoutingRequest

LOCAL_SECRET = secrets.token_bytes(32)
"""Of this process, while no namespace gave one."""


@lru_cache(maxsize=16)
def hasher_for(secret: bytes, block_size: int) -> Hasher:
    """One hasher for all who name blocks alike, so that they share what it computed."""
    return Hasher(secret, block_size)


class _Last:
    """The request that was hashed last, held so that its identity stays its own."""

    request: RoutingRequest | None = None
    hasher: Hasher | None = None
    keys: Keys
    numbers: list[int] | None = None


_last = _Last()


def keys_of(hasher: Hasher, request: RoutingRequest) -> Keys:
    """One key for each full block of the prompt."""
    if _last.request is not request or _last.hasher is not hasher:
        content = content_of(request.media, hasher.block_size) if request.media else ()
        _last.keys = hasher.keys(request.token_ids, hasher.root(request.adapter, request.cache_salt), content)
        _last.request, _last.hasher, _last.numbers = request, hasher, None
    return _last.keys


def numbers_of(hasher: Hasher, request: RoutingRequest) -> list[int]:
    """The same as Python's own numbers, for dictionaries. Do not change the list."""
    keys = keys_of(hasher, request)
    if (numbers := _last.numbers) is None:
        numbers = _last.numbers = keys.tolist()
    return numbers
