"""From pods to replicas: which serve, which start, which leave, and which will never serve."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import attrs

from dynamo_core.scaling import RoleState
from dynamo_kubernetes.api import Object
from dynamo_kubernetes.workloads import Workload

_GROUPS = ("leaderworkerset.sigs.k8s.io/group-index", "grove.io/podcliquescalinggroup-replica-index")
"""Labels that say which pods form one replica of several nodes."""
_STUCK = {"CrashLoopBackOff", "CreateContainerConfigError", "CreateContainerError", "ErrImageNeverPull", "ErrImagePull", "ImagePullBackOff", "InvalidImageName"}


@attrs.define
class Counter:
    """Counts replicas. A pod that has been stuck for `patience` seconds, by our own clock, will never serve."""

    patience: float
    _stuck: dict[str, float] = attrs.field(init=False, factory=dict[str, float])
    """Since when, by the uid of a pod."""

    def state(self, workload: Workload, pods: Sequence[Object]) -> RoleState:
        replicas: defaultdict[str, list[Object]] = defaultdict(list)
        for pod in pods:
            if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed"):
                replicas[_group(pod, workload.nodes)].append(pod)
        leaving = [group for group in replicas.values() if any(pod["metadata"].get("deletionTimestamp") for pod in group)]
        staying = [group for group in replicas.values() if group not in leaving]
        serving = sum(len(group) >= workload.nodes and all(map(_ready, group)) for group in staying)
        hopeless = sum(any(self._hopeless(pod) for pod in group) for group in staying)
        # Of more than are wanted, some leave as soon as the controllers get to it.
        ready = min(serving, workload.desired)
        draining = len(leaving) + max(0, len(staying) - workload.desired)
        starting = workload.desired - ready
        if workload.outdated and not starting and not draining:
            draining = min(workload.outdated, ready)  # a rollout has not begun to replace them
            ready -= draining
            starting = 0
        stable = ready == workload.desired and not starting and not draining
        return RoleState(workload.desired, ready, starting, draining, workload.gpus, stable, min(hopeless, starting))

    def forget(self, present: set[str]) -> None:
        """Pods that are gone need no memory."""
        self._stuck = {uid: since for uid, since in self._stuck.items() if uid in present}

    def _hopeless(self, pod: Object) -> bool:
        uid, now = pod["metadata"]["uid"], time.monotonic()
        if not _is_stuck(pod):
            self._stuck.pop(uid, None)
            return False
        return now - self._stuck.setdefault(uid, now) >= self.patience


def _group(pod: Object, nodes: int) -> str:
    labels = pod["metadata"].get("labels") or {}
    return next((f"group {labels[label]}" for label in _GROUPS if label in labels), "") if nodes > 1 else pod["metadata"]["name"]


def _ready(pod: Object) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in (pod.get("status") or {}).get("conditions") or ())


def _is_stuck(pod: Object) -> bool:
    status = pod.get("status") or {}
    if any(c["type"] == "PodScheduled" and c["status"] == "False" and c.get("reason") == "Unschedulable" for c in status.get("conditions") or ()):
        return True
    containers = [*(status.get("containerStatuses") or ()), *(status.get("initContainerStatuses") or ())]
    return any(((c.get("state") or {}).get("waiting") or {}).get("reason") in _STUCK for c in containers)
