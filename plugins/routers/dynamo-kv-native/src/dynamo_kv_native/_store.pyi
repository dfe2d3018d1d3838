from typing import final

import numpy as np
from numpy.typing import NDArray

@final
class Store:
    """Which slots hold which keys, of one level: what `dynamo_kv_router.store.Store` asks for."""

    def __new__(cls, shards: int, room: int) -> Store:
        """:param shards: a power of two, at most 65,536. :param room: keys that one shard may hold; when it has more, its oldest eighth is forgotten."""
    @property
    def forgotten(self) -> int:
        """Keys dropped for want of room."""
    def __len__(self) -> int: ...
    def add(self, keys: NDArray[np.uint64], slot: int, /) -> None: ...
    def remove(self, keys: NDArray[np.uint64], slot: int, /) -> None: ...
    def sweep(self, shard: int, dead: int, /) -> None: ...
    def depths(self, keys: NDArray[np.uint64], others: tuple[Store, ...], live: int, depths: NDArray[np.int32], /) -> None: ...
