"""The options by which discovery and the connector reach the API server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
from attrs import validators as v

from dynamo_kubernetes import access
from dynamo_kubernetes.api import Kube


def seconds(default: float) -> Any:
    """Also written as "500ms" or "10m"."""
    return attrs.field(default=default, validator=v.gt(0), metadata={"duration": True})


@attrs.define(eq=False)
class Connection:
    kubeconfig: Path | None = None
    """A kubeconfig file. Default: the service account of this pod; outside of a pod, `$KUBECONFIG` or `~/.kube/config`."""
    context: str | None = None
    """The context in that file. Default: its current one."""
    namespace: str | None = None
    """The Kubernetes namespace. Default: that of the pod or of the context."""
    timeout: float = seconds(5.0)
    """Seconds after which a call counts as unanswered."""

    def kube(self) -> Kube:
        """:raises ConfigError: there are no credentials."""
        return Kube(access.find(self.kubeconfig, self.context, self.namespace), self.timeout)
