"""The pytest plugin that comes with the core: fixtures, and nothing imported until one is used."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from dynamo_core.testing.cluster import Cluster
    from dynamo_core.testing.servers import Authority, EtcdCluster, NatsCluster


@pytest.fixture
def dynamo() -> type[Cluster]:
    """`async with dynamo.up(workers=4, engine="sim") as cluster:` — a fleet in one process."""
    from dynamo_core.testing.cluster import Cluster

    return Cluster


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Signs certificates for servers and clients on 127.0.0.1."""
    from dynamo_core.testing.servers import Authority

    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def etcd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., EtcdCluster]]:
    """`etcd_server(nodes=3)` starts a real etcd on free ports (see `EtcdCluster`); it ends with the session. Fails where etcd is not installed."""
    from dynamo_core.testing.servers import EtcdCluster

    yield from _servers(EtcdCluster, "etcd", tmp_path_factory)


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., NatsCluster]]:
    """`nats_server(nodes=3)` starts a real NATS on free ports (see `NatsCluster`); it ends with the session. Fails where it is not installed."""
    from dynamo_core.testing.servers import NatsCluster

    yield from _servers(NatsCluster, "nats", tmp_path_factory)


def _servers(kind: Any, name: str, folders: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    numbers = itertools.count()
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Any:
            cluster = kind(folders.mktemp(name) / str(next(numbers)), **options)
            stack.callback(cluster.kill)
            return cluster

        yield start
