"""The prefix keys of a request, computed once for all who ask: index, load, other frontends, and the queue that looks again and again."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from dynamo_core.kv.hashing import Hasher, Keys, content_of
from dynamo_core.kv.prehashed import Prehashed
from dynamo_core.routing.contract import RoutingRequest

LOCAL_SECRET = secrets.token_bytes(32)
"""Of this process, while no namespace gave one."""

_NONE: Keys = np.empty(0, np.uint64)


@lru_cache(maxsize=16)
def hasher_for(secret: bytes, block_size: int) -> Hasher:
    """One hasher for all who name blocks alike, so that they share what it computed."""
    return Hasher(secret, block_size)


class _Names:
    """Of one request, for as long as it lives."""

    __slots__ = ("hasher", "keys", "numbers", "request")

    def __init__(self, hasher: Hasher, request: RoutingRequest, ended: Callable[[object], None]) -> None:
        self.request = weakref.ref(request, ended)
        self.hasher = hasher
        self.keys = _computed(hasher, request)
        self.numbers: list[int] | None = None


_names: dict[int, _Names] = {}
"""By identity of the request: it is the same object from its decision to its end, and cannot be hashed by value at a bearable price."""


def keys_of(hasher: Hasher, request: RoutingRequest) -> Keys:
    """One key for each full block of the prompt; none when only keys of another secret are known."""
    return _of(hasher, request).keys


def numbers_of(hasher: Hasher, request: RoutingRequest) -> list[int]:
    """The same as Python's own numbers, for dictionaries. Do not change the list."""
    names = _of(hasher, request)
    if (numbers := names.numbers) is None:
        numbers = names.numbers = names.keys.tolist()
    return numbers


def _of(hasher: Hasher, request: RoutingRequest) -> _Names:
    me = id(request)
    names = _names.get(me)
    if names is None or names.hasher is not hasher or names.request() is not request:
        names = _names[me] = _Names(hasher, request, lambda ended: _forget(me, ended))
    return names


def _forget(me: int, ended: object) -> None:
    # Another request may live at its place by now.
    if (names := _names.get(me)) is not None and names.request is ended:
        del _names[me]


def _computed(hasher: Hasher, request: RoutingRequest) -> Keys:
    ids = request.token_ids
    if type(ids) is Prehashed and (ids.fingerprint not in (0, hasher.fingerprint) or ids.block_size != hasher.block_size):
        return _NONE
    content = content_of(request.media, hasher.block_size) if request.media else ()
    return hasher.keys(ids, hasher.root(request.adapter, request.cache_salt), content)
