"""Roles as components of a DynamoGraphDeployment, scaled through their scaling adapters where these exist."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import attrs

from dynamo_kubernetes.api import NOT_FOUND, Kube, Object, Refused
from dynamo_kubernetes.workloads import Dial, Workload, gpus_of, regards, writer_of

log = logging.getLogger(__name__)

GRAPHS = "dynamographdeployments"
ADAPTERS = "dynamographdeploymentscalingadapters"
_ROLES = {"prefill": "prefill", "decode": "decode", "worker": "aggregated"}
"""Of a component's `type`."""


@attrs.define
class Graph:
    """The components of one graph. `components` names them by role where their types do not tell."""

    name: str
    version: str
    components: Mapping[str, str]
    gpus: Mapping[str, int]
    _bypassed: set[str] = attrs.field(init=False, factory=set[str])

    async def read(self, kube: Kube) -> Mapping[str, Workload]:
        path = kube.path(f"nvidia.com/{self.version}", GRAPHS, self.name)
        try:
            graph = await kube.call("GET", path)
        except Refused as e:
            if e.code != NOT_FOUND:
                raise
            raise LookupError(f"there is no DynamoGraphDeployment {self.name!r} in namespace {kube.namespace!r}") from e
        try:
            adapters, _ = await kube.listing(kube.path(f"nvidia.com/{self.version}", ADAPTERS))
        except Refused as e:
            if e.code != NOT_FOUND:
                raise
            adapters = []
        by_name = {item["metadata"]["name"]: item for item in adapters}
        found: dict[str, Workload] = {}
        for index, component in enumerate(graph["spec"].get("components") or ()):
            if (role := self._role(component)) is None:
                continue
            if role in found:
                raise LookupError(f"{self.name!r} has two {role} components, {found[role].name} and {component['name']}; say which by `components`")
            adapter = by_name.get(f"{self.name}-{component['name'].lower()}")
            found[role] = self._workload(kube, path, graph, component, index, role, adapter)
        for role, wanted in self.components.items():
            if role not in found:
                raise LookupError(f"{self.name!r} has no component {wanted!r}; it has {', '.join(c['name'] for c in graph['spec'].get('components') or ())}")
        if not found:
            raise LookupError(f"{self.name!r} has no component of type prefill, decode or worker; name them by `components`")
        return found

    def _role(self, component: Object) -> str | None:
        if self.components:
            return next((role for role, name in self.components.items() if name == component["name"]), None)
        return _ROLES.get(component.get("type", ""))

    def _workload(self, kube: Kube, path: str, graph: Object, component: Object, index: int, role: str, adapter: Object | None) -> Workload:
        name, written = component["name"], component.get("replicas")
        carried = True
        if adapter is not None:
            self._bypassed.discard(name)
            desired = int(adapter["spec"]["replicas"])
            path = kube.path(f"nvidia.com/{self.version}", ADAPTERS, adapter["metadata"]["name"], "scale")
            dial = Dial(path, adapter["metadata"]["resourceVersion"])
            carried = desired == (1 if written is None else written)
        else:
            if name not in self._bypassed:
                self._bypassed.add(name)
                log.warning("component %s of %s has no scaling adapter: its replicas are written to the graph itself", name, self.name)
            desired = 1 if written is None else int(written)
            dial = Dial(path, graph["metadata"]["resourceVersion"], name, index, written)
        status = graph.get("status") or {}
        counted = (status.get("components") or {}).get(name) or {}
        phase = (status.get("rollingUpdate") or {}).get("phase")
        nodes = int((component.get("multinode") or {}).get("nodeCount") or 1)
        gpus = self.gpus.get(role, gpus_of(component.get("podTemplate")))
        if gpus is None:
            raise LookupError(f"component {name!r} gets its GPUs by resource claims, which do not say how many; set `gpus` for {role}")
        return Workload(
            role, f"component {name}", desired, dial, f"nvidia.com/dynamo-graph-deployment-name={self.name},nvidia.com/dynamo-component={name}",
            nodes, gpus if role in self.gpus else gpus * nodes,
            outdated=max(0, counted.get("replicas", 0) - counted.get("updatedReplicas", counted.get("replicas", 0))),
            rolling=f"a rolling update of {self.name} is {'waiting' if phase == 'Pending' else 'in progress'}" if phase in ("Pending", "InProgress") else None,
            carried=carried, writer=writer_of(adapter, "spec", "replicas") if adapter is not None else writer_of(graph, "spec", "components"),
            regards=regards(graph, f"nvidia.com/{self.version}", "DynamoGraphDeployment"),
        )
