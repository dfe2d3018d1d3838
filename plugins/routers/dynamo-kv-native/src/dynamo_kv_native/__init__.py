"""A compiled store for the index of `dynamo-kv-router`, which finds it here by itself.

Importing it raises ImportError where it could not be compiled.
"""

from dynamo_kv_native._store import Store

__all__ = ["Store"]
