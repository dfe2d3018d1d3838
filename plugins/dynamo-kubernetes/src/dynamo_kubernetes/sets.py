"""Roles as Deployments and LeaderWorkerSets: found by a label, told apart by another."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from dynamo_core.scaling import ROLES
from dynamo_kubernetes.api import NOT_FOUND, Kube, Object, Refused
from dynamo_kubernetes.workloads import Dial, Workload, gpus_of, regards, writer_of

_DEPLOYMENTS = "apps/v1"
_SETS = "leaderworkerset.x-k8s.io/v1"


@attrs.frozen
class Sets:
    """Every Deployment and LeaderWorkerSet with the labels of `selector` and a role in the label `role_label`."""

    selector: str
    role_label: str
    gpus: Mapping[str, int]

    async def read(self, kube: Kube) -> Mapping[str, Workload]:
        found: dict[str, Workload] = {}
        kinds = ((_DEPLOYMENTS, "deployments", "Deployment", self._deployment), (_SETS, "leaderworkersets", "LeaderWorkerSet", self._set))
        for api, plural, kind, made in kinds:
            try:
                items, _ = await kube.listing(kube.path(api, plural), labelSelector=f"{self.selector},{self.role_label}")
            except Refused as e:
                if e.code != NOT_FOUND:
                    raise
                continue  # this cluster has no such kind
            for item in items:
                name, role = item["metadata"]["name"], item["metadata"]["labels"][self.role_label]
                if role not in ROLES:
                    raise LookupError(f"{kind} {name} has {self.role_label}={role}; a role is one of {', '.join(ROLES)}")
                if role in found:
                    raise LookupError(f"{found[role].name} and {kind} {name} both have the role {role}; narrow `selector`")
                dial = Dial(kube.path(api, plural, name, "scale"), item["metadata"]["resourceVersion"])
                found[role] = made(item, role, dial)
        if not found:
            raise LookupError(f"namespace {kube.namespace!r} has no Deployment or LeaderWorkerSet with {self.selector} and a label {self.role_label}")
        return found

    def _deployment(self, item: Object, role: str, dial: Dial) -> Workload:
        spec, status = item["spec"], item.get("status") or {}
        name = f"Deployment {item['metadata']['name']}"
        # Until the controller has seen the object, its counts are of another one.
        seen = status.get("observedGeneration", 0) >= item["metadata"]["generation"]
        return Workload(role, name, int(spec.get("replicas", 1)), dial, _labels(spec["selector"]), 1, self._gpus(role, name, (spec["template"], 1)),
                        outdated=max(0, status.get("replicas", 0) - status.get("updatedReplicas", 0)) if seen else 0,
                        writer=writer_of(item, "spec", "replicas"), regards=regards(item, _DEPLOYMENTS, "Deployment"))

    def _set(self, item: Object, role: str, dial: Dial) -> Workload:
        spec, status = item["spec"], item.get("status") or {}
        name, template = f"LeaderWorkerSet {item['metadata']['name']}", spec["leaderWorkerTemplate"]
        size = int(template.get("size") or 1)
        gpus = self._gpus(role, name, (template.get("leaderTemplate") or template.get("workerTemplate"), 1), (template.get("workerTemplate"), size - 1))
        return Workload(role, name, int(spec.get("replicas", 1)), dial, f"leaderworkerset.sigs.k8s.io/name={item['metadata']['name']}", size, gpus,
                        outdated=max(0, status.get("replicas", 0) - status.get("updatedReplicas", status.get("replicas", 0))),
                        writer=writer_of(item, "spec", "replicas"), regards=regards(item, _SETS, "LeaderWorkerSet"))

    def _gpus(self, role: str, name: str, *pods: tuple[Object | None, int]) -> int:
        if role in self.gpus:
            return self.gpus[role]
        total = 0
        for template, count in pods:
            each = gpus_of(template)
            if each is None:
                raise LookupError(f"{name} gets its GPUs by resource claims, which do not say how many; set `gpus` for {role}")
            total += each * count
        return total


def _labels(selector: Object) -> str:
    """A label selector as the API server takes it in a query."""
    parts = [f"{key}={value}" for key, value in (selector.get("matchLabels") or {}).items()]
    for rule in selector.get("matchExpressions") or ():
        key, values = rule["key"], ",".join(rule.get("values") or ())
        parts.append({"In": f"{key} in ({values})", "NotIn": f"{key} notin ({values})", "Exists": key, "DoesNotExist": f"!{key}"}[rule["operator"]])
    return ",".join(parts)
