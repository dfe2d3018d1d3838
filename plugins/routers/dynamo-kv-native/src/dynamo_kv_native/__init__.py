"""A compiled store for the index of `dynamo-kv-router`, which finds it here by itself."""

try:
    from dynamo_kv_native._store import Store
except ModuleNotFoundError as e:
    raise ImportError("dynamo-kv-native was installed without a C compiler; install one, and then it again") from e

__all__ = ["Store"]
