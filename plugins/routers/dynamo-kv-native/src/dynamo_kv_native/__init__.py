"""The compiled parts of the path of KV events: where `dynamo-core` and `dynamo-kv-router` find them here, they take them by themselves."""

try:
    from dynamo_kv_native._blocks import Blocks
    from dynamo_kv_native._events import pack_numbers
    from dynamo_kv_native._names import name_blocks
    from dynamo_kv_native._store import Store
except ModuleNotFoundError as e:
    raise ImportError("dynamo-kv-native was installed without a C compiler; install one, and then it again") from e

__all__ = ["Blocks", "Store", "name_blocks", "pack_numbers"]
