"""What a role's replicas are in Kubernetes: something that has a number of replicas, and the pods that it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs

from dynamo_kubernetes.api import JSON_PATCH, MERGE_PATCH, Kube, Object

MANAGER = "dynamo-planner"
"""Our name among the writers of a field."""


@attrs.frozen
class Dial:
    """Where the number of replicas is written: a scale subresource, or the entry of a component in a graph."""

    path: str
    version: str = attrs.field(eq=False)
    """Resource version of what was read."""
    component: str | None = None
    index: int = 0
    written: int | None = 0
    """What the entry of the graph says; `None` if it leaves it out."""


@attrs.frozen
class Workload:
    role: str
    name: str
    """Kind and name, for people."""
    desired: int
    dial: Dial
    selector: str
    """Labels of its pods."""
    nodes: int = 1
    """Pods of one replica."""
    gpus: int = 0
    """GPUs of one replica."""
    outdated: int = 0
    """Replicas that a rollout is about to replace."""
    rolling: str | None = None
    """Why nothing may be written now."""
    carried: bool = True
    """Whether the platform has taken over what its dial says."""
    writer: str | None = None
    """Who wrote the number of replicas last, where that is known."""
    regards: Mapping[str, str] = attrs.field(factory=dict)
    """The object that events are about."""


class Source(Protocol):
    """Where workloads are found."""

    async def read(self, kube: Kube) -> Mapping[str, Workload]:
        """By role. :raises LookupError: what there is does not fit the options; says why."""
        ...


@attrs.frozen
class Write:
    """One request that changes the replicas of one workload, or of several components of one graph at once."""

    changes: Sequence[tuple[Workload, int]]

    @property
    def growth(self) -> int:
        return sum(count - workload.desired for workload, count in self.changes)

    async def send(self, kube: Kube, *, dry_run: bool = False) -> None:
        params = {"fieldManager": MANAGER, **({"dryRun": "All"} if dry_run else {})}
        dial = self.changes[0][0].dial
        if dial.component is None and not self.changes[0][0].desired:
            # A scale leaves out its replicas when they are 0, so that there is nothing to test: the version of the whole object guards the write.
            body: Any = {"metadata": {"resourceVersion": dial.version}, "spec": {"replicas": self.changes[0][1]}}
            await kube.call("PATCH", dial.path, body, content_type=MERGE_PATCH, **params)
        else:
            patch = [step for workload, count in self.changes for step in _steps(workload, count)]
            await kube.call("PATCH", dial.path, patch, content_type=JSON_PATCH, **params)


def _steps(workload: Workload, count: int) -> list[Object]:
    """Set the replicas, if nobody has changed the number meanwhile, and a component is still at its place. Whoever writes other fields does not matter."""
    dial = workload.dial
    if dial.component is None:
        return [{"op": "test", "path": "/spec/replicas", "value": workload.desired}, {"op": "replace", "path": "/spec/replicas", "value": count}]
    entry = f"/spec/components/{dial.index}"
    guards: list[Object] = [{"op": "test", "path": f"{entry}/name", "value": dial.component}]
    if dial.written is not None:
        guards.append({"op": "test", "path": f"{entry}/replicas", "value": dial.written})
    return [*guards, {"op": "add", "path": f"{entry}/replicas", "value": count}]


def writes(changes: Sequence[tuple[Workload, int]]) -> list[Write]:
    """Components of one graph change in one request; what goes down goes first."""
    graph = [change for change in changes if change[0].dial.component is not None]
    single = [Write([change]) for change in changes if change[0].dial.component is None]
    return sorted([*single, *([Write(graph)] if graph else [])], key=lambda write: write.growth)


# ------------------------------------------------------------------ reading objects


def gpus_of(template: Object | None) -> int | None:
    """GPUs that a pod of this template takes; `None` when its resource claims would say."""
    spec = (template or {}).get("spec") or {}
    found = 0
    for container in spec.get("containers") or ():
        resources = container.get("resources") or {}
        for name, amount in {**(resources.get("requests") or {}), **(resources.get("limits") or {})}.items():
            if name.partition("/")[2].startswith(("gpu", "mig-")):
                found += int(amount)
    return None if not found and spec.get("resourceClaims") else found


def writer_of(item: Object, *fields: str) -> str | None:
    """Who wrote a field last, as the API server noted it."""
    found: tuple[str, str] | None = None
    for entry in item["metadata"].get("managedFields") or ():
        inside: Any = entry.get("fieldsV1") or {}
        for field in fields:
            inside = inside.get(f"f:{field}") if isinstance(inside, dict) else None
        if inside is not None:
            found = max(found or ("", ""), (entry.get("time", ""), entry.get("manager", "")))
    return found[1] if found else None


def regards(item: Object, api: str, kind: str) -> dict[str, str]:
    metadata = item["metadata"]
    return {"apiVersion": api, "kind": kind, "name": metadata["name"], "namespace": metadata["namespace"], "uid": metadata["uid"]}
