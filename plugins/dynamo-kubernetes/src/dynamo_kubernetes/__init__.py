"""Kubernetes: discovery in the API server joined with the readiness of pods, and the connector by which a planner scales."""

from dynamo_core.hookspecs import hookimpl
from dynamo_core.plugins import Registry


@hookimpl
def dynamo_register(registry: Registry) -> None:
    registry.discovery("kubernetes", "dynamo_kubernetes.discovery:KubernetesDiscovery", summary="the Kubernetes API, joined with the readiness of pods")
    registry.add("connector", "kubernetes", "dynamo_kubernetes.connector:KubernetesConnector",
                 summary="replicas of a DynamoGraphDeployment, of Deployments or of LeaderWorkerSets")
