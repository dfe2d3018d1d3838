"""Where the index keeps its keys: in Python's dictionaries, or, where `dynamo-kv-native` is installed, in a compiled store.

Both do the same, and are chosen from once, by the option `store` of the provider `kv-index`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, Self

import attrs
import numpy as np
from numpy.typing import NDArray

from dynamo_core.kv.hashing import Keys

Depths = NDArray[np.int32]
Choice = Literal["auto", "python", "native"]


class Store(Protocol):
    """One level. Knows slots, which are small numbers, not workers; a mask of slots has a bit for each."""

    @property
    def forgotten(self) -> int:
        """Keys dropped for want of room."""
        ...

    def __len__(self) -> int:
        """Keys that anybody holds."""
        ...

    def add(self, keys: Keys, slot: int, /) -> None:
        """The slot holds these blocks from now on. A shard that has more than its room forgets its oldest eighth."""
        ...

    def remove(self, keys: Keys, slot: int, /) -> None:
        """The slot does not hold these blocks any more. It need not have held them."""
        ...

    def sweep(self, shard: int, dead: int, /) -> None:
        """Forget the slots of a mask in one shard."""
        ...

    def depths(self, keys: Keys, others: tuple[Self, ...], live: int, depths: Depths, /) -> None:
        """How much of the chain `keys` each slot of `live` holds, here and in `others` together.

        :param depths: by slot, all 0; those of the slots that hold anything are filled in.
        """
        ...


@attrs.frozen
class Kind:
    """One kind of store."""

    name: str
    make: Callable[[int, int], Store]
    """From the number of shards, a power of two, and the keys that one shard may hold."""
    shard: int
    """Keys that a shard should have at most, so that nothing that is done to all of it takes long."""


def kind_of(choice: Choice) -> Kind:
    """:raises ValueError: `native`, and it is not installed."""
    if choice != "python":
        try:
            from dynamo_kv_native import Store as NativeStore
        except ImportError as e:
            if choice == "native":
                raise ValueError(f"the compiled store cannot be imported ({e}); pip install 'dynamo-kv-router[native]', or set store = 'python'") from e
        else:
            return Kind("native", NativeStore, 4096)
    from dynamo_kv_router.plain_store import PlainStore

    return Kind("python", PlainStore, 16384)
