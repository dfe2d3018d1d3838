"""Discovery in etcd: leases, watched prefixes, several nodes, authentication and TLS."""

from dynamo_core.hookspecs import hookimpl
from dynamo_core.plugins import Registry


@hookimpl
def dynamo_register(registry: Registry) -> None:
    registry.discovery("etcd", "dynamo_etcd.store:EtcdDiscovery", summary="an etcd cluster, through its JSON gateway")
