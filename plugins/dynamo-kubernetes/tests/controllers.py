"""Whoever else a cluster has, each as small as it can be: processes beside a real API server.

    controllers.py                      each line on its input starts a process, and is answered by its id; `stop ID` ends it
    start KUBECONFIG ROLE...            plays these roles in the namespace of that file

The program is loaded once, and forked for each line: most tests want a process of their own.

    scheduler    gives pods a node, unless the ConfigMap `no-room` in the namespace names their role
    kubelet      makes them run, and be ready; lets those that are deleted drain. Where a container has a command, it runs: see `node.py`
    operator     carries scaling adapters to their graphs, makes the pods of components, reports
    sets         makes the pods of Deployments and LeaderWorkerSets, reports
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from node import Node

from dynamo_kubernetes.access import find
from dynamo_kubernetes.api import CONFLICT, MERGE_PATCH, NOT_FOUND, Kube, Refused, Unreachable
from dynamo_kubernetes.records import now

STEP = 0.05
READY_AFTER, DRAIN = 0.15, 0.2
"""Seconds that a pod without a command of its own needs to start and to end."""
NVIDIA = "nvidia.com/v1beta1"
SETS = "leaderworkerset.x-k8s.io/v1"


class Controllers:
    def __init__(self, kube: Kube, node: Node) -> None:
        self.kube, self.node = kube, node
        self.since: dict[str, float] = {}

    async def list(self, api: str, plural: str) -> list[Any]:
        try:
            return (await self.kube.listing(self.kube.path(api, plural)))[0]
        except Refused as e:
            if e.code != NOT_FOUND:
                raise
            return []

    # ------------------------------------------------------------------ nodes

    async def scheduler(self) -> None:
        no_room = {item["metadata"]["name"]: item.get("data", {}) for item in await self.list("v1", "configmaps")}.get("no-room", {})
        for pod in await self.list("v1", "pods"):
            if pod["spec"].get("nodeName"):
                continue
            path = self.kube.path("v1", "pods", pod["metadata"]["name"])
            if pod["metadata"]["labels"].get("role") in no_room:
                if not pod["status"].get("conditions"):
                    await self.status(pod, {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available"}]})
            else:
                target = {"apiVersion": "v1", "kind": "Node", "name": "node-1"}
                await self.kube.call("POST", f"{path}/binding", {"metadata": {"name": pod["metadata"]["name"]}, "target": target})

    async def kubelet(self) -> None:
        for pod in await self.list("v1", "pods"):
            name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
            if not pod["spec"].get("nodeName"):
                continue
            if pod["metadata"].get("deletionTimestamp"):
                if time.monotonic() - self.since.setdefault(f"end {uid}", time.monotonic()) >= DRAIN and self.node.ended(pod):
                    await self.kube.call("DELETE", self.kube.path("v1", "pods", name), {"gracePeriodSeconds": 0, "preconditions": {"uid": uid}})
            elif pod["spec"]["containers"][0].get("command"):
                found = await self.node.look(pod)
                statuses = pod["status"].get("containerStatuses") or [{}]
                if found.ready != is_ready(pod) or found.number != statuses[0].get("restartCount"):
                    await self.status(pod, running(pod, ready=found.ready, number=found.number))
            elif pod["status"].get("phase") != "Running":
                await self.status(pod, running(pod, ready=False))
            elif time.monotonic() - self.since.setdefault(uid, time.monotonic()) >= READY_AFTER and not is_ready(pod):
                await self.status(pod, running(pod, ready=True))

    async def status(self, item: Any, status: Any) -> None:
        path = self.kube.path("v1", "pods", item["metadata"]["name"], "status")
        await self.kube.call("PATCH", path, {"status": status}, content_type=MERGE_PATCH)

    # ------------------------------------------------------------------ workloads

    async def operator(self) -> None:
        adapters = {item["metadata"]["name"]: item for item in await self.list(NVIDIA, "dynamographdeploymentscalingadapters")}
        pods = await self.list("v1", "pods")
        for graph in await self.list(NVIDIA, "dynamographdeployments"):
            name, counted = graph["metadata"]["name"], {}
            path = self.kube.path(NVIDIA, "dynamographdeployments", name)
            for index, component in enumerate(graph["spec"]["components"]):
                adapter = adapters.get(f"{name}-{component['name'].lower()}")
                if adapter is not None and adapter["spec"]["replicas"] != component.get("replicas"):
                    component["replicas"] = adapter["spec"]["replicas"]
                    patch = [{"op": "test", "path": f"/spec/components/{index}/name", "value": component["name"]},
                             {"op": "add", "path": f"/spec/components/{index}/replicas", "value": component["replicas"]}]
                    await self.kube.call("PATCH", path, patch, content_type="application/json-patch+json", fieldManager="operator")
                labels = {"nvidia.com/dynamo-graph-deployment-name": name, "nvidia.com/dynamo-component": component["name"], "role": component.get("type", "")}
                nodes = component.get("multinode", {}).get("nodeCount", 1)
                counted[component["name"]] = await self.reconcile(pods, f"{name}-{component['name'].lower()}", labels, component.get("replicas", 1),
                                                                  [component.get("podTemplate")] * nodes, "grove.io/podcliquescalinggroup-replica-index")
            ready = all(c["readyReplicas"] == component.get("replicas", 1) for c, component in zip(counted.values(), graph["spec"]["components"], strict=True))
            status = {"components": counted, "conditions": [{"type": "Ready", "status": str(ready), "reason": "all_resources_are_ready" if ready else "pods_not_ready"}]}
            await self.kube.call("PATCH", f"{path}/status", {"status": status}, content_type=MERGE_PATCH)

    async def sets(self) -> None:
        pods = await self.list("v1", "pods")
        for api, plural in (("apps/v1", "deployments"), (SETS, "leaderworkersets")):
            for item in await self.list(api, plural):
                name, spec = item["metadata"]["name"], item["spec"]
                labels = {**spec.get("selector", {}).get("matchLabels", {}), "role": item["metadata"]["labels"].get("dynamo/role", "")}
                if plural == "leaderworkersets":
                    labels["leaderworkerset.sigs.k8s.io/name"] = name
                group = spec.get("leaderWorkerTemplate", {"workerTemplate": spec.get("template")})
                templates = [group.get("leaderTemplate") or group["workerTemplate"], *[group["workerTemplate"]] * (group.get("size", 1) - 1)]
                counted = await self.reconcile(pods, name, labels, spec.get("replicas", 1), templates, "leaderworkerset.sigs.k8s.io/group-index")
                generation = {"observedGeneration": item["metadata"]["generation"]} if plural == "deployments" else {}
                await self.kube.call("PATCH", self.kube.path(api, plural, name, "status"), {"status": {**counted, **generation}}, content_type=MERGE_PATCH)

    async def reconcile(self, pods: list[Any], name: str, labels: dict[str, str], wanted: int, templates: list[Any], group_label: str) -> dict[str, int]:
        """Make as many groups of pods as are wanted, a pod for each template; of too many, those that are not ready go first. Returns what a status counts."""
        groups: dict[str, list[Any]] = {}
        for pod in pods:
            if labels.items() <= pod["metadata"]["labels"].items() and not pod["metadata"].get("deletionTimestamp"):
                groups.setdefault(pod["metadata"]["labels"][group_label], []).append(pod)
        for group in [key for key, members in groups.items() if len(members) < len(templates)]:
            await self.remove(groups.pop(group))  # a group lives and dies together
        order = sorted(groups.values(), key=lambda group: (all(map(is_ready, group)), group[0]["metadata"]["creationTimestamp"]))
        for group in order[: max(0, len(order) - wanted)]:
            await self.remove(group)
        for _ in range(wanted - len(order)):
            number = uuid.uuid4().hex[:6]
            for place, template in enumerate(templates):
                made = template or {"spec": {"containers": [{"name": "main", "image": "none"}]}}
                metadata = {"name": f"{name}-{number}-{place}", "labels": {**made.get("metadata", {}).get("labels", {}), **labels, group_label: number}}
                await self.kube.call("POST", self.kube.path("v1", "pods"), {"metadata": metadata, "spec": made["spec"]})
        kept = order[max(0, len(order) - wanted):]
        ready = sum(all(map(is_ready, group)) for group in kept)
        return {"replicas": len(kept), "updatedReplicas": len(kept), "readyReplicas": ready, "availableReplicas": ready}

    async def remove(self, group: list[Any]) -> None:
        for pod in group:
            await self.kube.call("DELETE", self.kube.path("v1", "pods", pod["metadata"]["name"]))


def is_ready(pod: Any) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ()))


def running(pod: Any, *, ready: bool, number: int = 0) -> Any:
    """:param number: of the container; each that has ended has another id than its successor."""
    statuses = [{"name": c["name"], "ready": ready, "started": True, "restartCount": number, "image": c.get("image", ""), "imageID": "",
                 "containerID": f"test://{pod['metadata']['uid']}/{number}", "state": {"running": {"startedAt": now()[:19] + "Z"}}} for c in pod["spec"]["containers"]]
    conditions = [{"type": kind, "status": str(value)} for kind, value in (("PodScheduled", True), ("Ready", ready), ("ContainersReady", ready))]
    return {"phase": "Running", "conditions": conditions, "containerStatuses": statuses}


async def run(kubeconfig: Path, roles: list[str]) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)  # pyright: ignore[reportOptionalMemberAccess]
    async with Kube(find(kubeconfig, None, None), 5.0, agent="controllers") as kube:
        node = Node(kube, kubeconfig)
        controllers = Controllers(kube, node)
        try:
            while True:
                await play(controllers, roles)
                await asyncio.sleep(STEP)
        finally:
            await node.close()


async def play(controllers: Controllers, roles: list[str]) -> None:
    for role in roles:
        try:
            await getattr(controllers, role)()
        except Refused as e:
            if e.code not in (CONFLICT, NOT_FOUND):  # such as 403, for a moment, from a server that has just started
                print(f"{role}: {e}", file=sys.stderr)
        except Unreachable:
            pass


def main() -> None:
    for line in sys.stdin:
        command, *words = line.split()
        if command == "stop":
            os.kill(int(words[0]), signal.SIGTERM)
            os.waitpid(int(words[0]), 0)
            print("stopped", flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            with contextlib.suppress(asyncio.CancelledError):
                asyncio.run(run(Path(words[0]), words[1:]))
            os._exit(0)


if __name__ == "__main__":
    main()
