"""A secret that all processes of a namespace share: from the configuration, or made by whoever is first."""

from __future__ import annotations

import asyncio
import secrets as random

from dynamo_core.runtime.runtime import Runtime

SETTLE = 0.2
"""Seconds after which two processes that were first at the same time see whose record stayed."""


async def shared_secret(runtime: Runtime, name: str) -> bytes:
    """The secret `name` of the namespace. Without one in the configuration it lies in the discovery store, where it stays.

    Two processes that are first at the same moment agree, because both read again what stayed; should one be held up for longer
    than `SETTLE` between looking and writing, they do not, which users of the secret must notice and say.
    """
    if runtime.config.kv.secret:
        return runtime.config.kv.secret.encode()
    key = f"v1/secrets/{runtime.config.namespace}/{name}"
    if (found := await runtime.discovery.get(key)) is not None:
        return found
    mine = random.token_hex(32).encode()
    await runtime.discovery.put(key, mine)
    await asyncio.sleep(SETTLE)
    return await runtime.discovery.get(key) or mine
