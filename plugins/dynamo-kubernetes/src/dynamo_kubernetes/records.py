"""How records, leases and pods look in the API server, and how they are read back.

    ConfigMap  dynamo-<digest of store and key>   one record: the key in an annotation, the value as binary data, the lease in a label
    Lease      dynamo-<id>                        one lease; of a pod's process it is owned by the pod and names the container it runs in
    Pod                                           whose readiness decides whether the records of its leases are seen
"""

from __future__ import annotations

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import attrs

from dynamo_core.discovery.contract import Put
from dynamo_kubernetes.api import Object

STORE = "dynamo/store"
LEASE = "dynamo/lease"
KEY = "dynamo/key"
CONTAINER = "dynamo/container"
CONTAINER_ID = "dynamo/container-id"


@attrs.frozen
class Pod:
    uid: str
    ready: bool
    """And not on its way out."""
    ended: bool
    containers: Mapping[str, str]
    """Id of each container that runs."""


@attrs.frozen
class Claim:
    """A lease. Without a pod it lives by its heartbeats; with one, as long as the container in which its owner runs."""

    id: int
    uid: str
    ttl: float
    beat: str
    version: str = attrs.field(eq=False)
    pod: str | None = None
    pod_uid: str = ""
    container: str = ""
    container_id: str = ""

    def lives_in(self, pod: Pod | None) -> bool:
        return pod is not None and pod.uid == self.pod_uid and not pod.ended and pod.containers.get(self.container) == self.container_id


@attrs.frozen
class Home:
    """Where a process runs: what ties its leases to the life of its container."""

    pod: str
    uid: str
    container: str
    container_id: str


# ------------------------------------------------------------------ names


def lease_name(id: int) -> str:
    return f"dynamo-{id:016x}"


def record_name(store: str, key: str) -> str:
    return "dynamo-" + hashlib.sha256(f"{store}\n{key}".encode()).hexdigest()[:40]


# ------------------------------------------------------------------ written


def record_object(store: str, key: str, value: bytes, claim: Claim | None) -> Object:
    metadata: Object = {"name": record_name(store, key), "labels": {STORE: store}, "annotations": {KEY: key}}
    if claim is not None:
        metadata["labels"][LEASE] = f"{claim.id:016x}"
        metadata["ownerReferences"] = [{"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "name": lease_name(claim.id), "uid": claim.uid}]
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "binaryData": {"value": b64encode(value).decode()}}


def lease_object(store: str, id: int, seconds: int, home: Home | None, holder: str) -> Object:
    metadata: Object = {"name": lease_name(id), "labels": {STORE: store, LEASE: f"{id:016x}"}}
    if home is not None:
        metadata["ownerReferences"] = [{"apiVersion": "v1", "kind": "Pod", "name": home.pod, "uid": home.uid}]
        metadata["annotations"] = {CONTAINER: home.container, CONTAINER_ID: home.container_id}
    spec = {"holderIdentity": holder, "leaseDurationSeconds": seconds, "acquireTime": now(), "renewTime": now()}
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}


def now() -> str:
    """Readers only look whether it changes."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


# ------------------------------------------------------------------ read


def read_record(found: Object) -> Put | None:
    """`None`: the object is not one of ours, whatever its labels say."""
    metadata = found["metadata"]
    key = (metadata.get("annotations") or {}).get(KEY)
    if key is None or record_name(metadata["labels"][STORE], key) != metadata["name"]:
        return None
    lease = metadata["labels"].get(LEASE)
    return Put(key, b64decode((found.get("binaryData") or {}).get("value", "")), int(lease, 16) if lease else None)


def read_claim(found: Object) -> Claim:
    metadata, spec = found["metadata"], found["spec"]
    owner: Mapping[str, Any] = next((o for o in metadata.get("ownerReferences") or () if o["kind"] == "Pod"), {})
    notes = metadata.get("annotations") or {}
    return Claim(int(metadata["labels"][LEASE], 16), metadata["uid"], float(spec["leaseDurationSeconds"]), str(spec.get("renewTime")),
                 metadata["resourceVersion"], owner.get("name"), owner.get("uid", ""), notes.get(CONTAINER, ""), notes.get(CONTAINER_ID, ""))


def read_pod(found: Object) -> Pod:
    status = found.get("status") or {}
    conditions = {c["type"]: c["status"] for c in status.get("conditions") or ()}
    running = {c["name"]: str(c.get("containerID", "")) for c in status.get("containerStatuses") or () if (c.get("state") or {}).get("running") is not None}
    leaving = found["metadata"].get("deletionTimestamp") is not None
    return Pod(found["metadata"]["uid"], conditions.get("Ready") == "True" and not leaving, status.get("phase") in ("Succeeded", "Failed"), running)
