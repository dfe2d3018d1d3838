from array import array

import numpy as np
from numpy.typing import NDArray

def name_blocks(tokens: array[int] | NDArray[np.uint64], per_token: NDArray[np.uint64], per_depth: NDArray[np.uint64], parent: int, /) -> bytearray:
    """One key for each full block of tokens (uint64) that follow the block, or root, `parent`: 8 bytes each in this machine's order.

    :param per_token: secret factors by place in a block. :param per_depth: and by place of the block. :raises OverflowError: `parent` is no 64-bit number.
    """
