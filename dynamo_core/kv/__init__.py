"""The KV cache as the fleet sees it: how blocks are named, how engine events become changes, and how changes travel.

Both ends use it: workers turn what their engine reports into changes of 64-bit prefix keys (the relay of the runtime), and routers
turn prompts into the same keys. The index that routers keep is a plugin's.
"""

from dynamo_core.kv.chains import Chains
from dynamo_core.kv.hashing import Hasher
from dynamo_core.kv.wire import LEVELS, Change, News, Op

__all__ = ["LEVELS", "Chains", "Change", "Hasher", "News", "Op"]
