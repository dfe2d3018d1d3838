from __future__ import annotations

import asyncio
from collections.abc import Sequence

from dynamo_core.config.schema import Config, Kv, Secret, Use
from dynamo_core.plugins import Plugins
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.runtime.shared_secret import shared_secret


async def secrets_of(config: Config, processes: int) -> Sequence[bytes]:
    async def one() -> bytes:
        async with Runtime.open(config, Plugins.load()) as runtime:
            return await shared_secret(runtime, "kv")

    return await asyncio.gather(*(one() for _ in range(processes)))


def config(name: str, namespace: str = "dynamo", secret: str | None = None) -> Config:
    return Config(namespace=namespace, discovery=Use("memory", {"name": name}), request_plane=Use("in-process"), event_plane=Use("in-process", {"name": name}),
                  kv=Kv(Secret(secret) if secret else None))


async def test_processes_that_start_together_agree_and_those_that_come_later_agree_with_them():
    async with Runtime.open(config("secrets-1"), Plugins.load()):
        together = await secrets_of(config("secrets-1"), 6)
        assert {*together, *await secrets_of(config("secrets-1"), 1)} == {together[0]}
    assert len(together[0]) == 64


async def test_namespaces_have_secrets_of_their_own():
    (one,), (other,) = await secrets_of(config("secrets-2"), 1), await secrets_of(config("secrets-2", "other"), 1)
    assert one != other


async def test_a_configured_secret_is_used_and_never_published():
    async with Runtime.open(config("secrets-3", secret="mine"), Plugins.load()) as runtime:
        assert await shared_secret(runtime, "kv") == b"mine"
        assert not await runtime.discovery.items("v1/secrets/")
