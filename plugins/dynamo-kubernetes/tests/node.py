"""A node of the cluster: runs the container of a pod as a process of this machine.

The process has the container's command, environment, ConfigMaps, service account and probes, and is told to end as a container is. What it has not is
an image, a user and a network of its own: all pods have the address 127.0.0.1, and each a free port for each port that it names.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import attrs

from dynamo_core.testing.servers import free_port
from dynamo_kubernetes.api import Kube

ADDRESS = "127.0.0.1"
PORTS = {"http": "DYNAMO__FRONTEND__PORT", "status": "DYNAMO__STATUS__PORT"}
"""The setting that says where a process listens, by the name of the container's port."""
GRACE = 20.0
"""Seconds that processes have when the node itself ends."""


@attrs.define
class Running:
    process: asyncio.subprocess.Process
    ports: dict[str, int]
    number: int
    """Of the container; one more for each that has ended before."""
    started: bool = False
    ready: bool = False
    told: bool = False
    looked: float = 0.0


@attrs.define
class Node:
    kube: Kube
    kubeconfig: Path
    """How processes reach the API server: with its address, and the token of their own service account."""
    containers: dict[str, Running] = attrs.field(factory=dict[str, Running])
    """By the uid of the pod."""

    async def look(self, pod: Any) -> Running:
        """Have the container of this pod running, and probe it."""
        uid, container = pod["metadata"]["uid"], pod["spec"]["containers"][0]
        found = self.containers.get(uid)
        if found is None or found.process.returncode is not None:
            found = self.containers[uid] = await self._start(pod, container, found.number + 1 if found is not None else 0)
        elif time.monotonic() - found.looked >= (1.0 if found.ready else 0.2):
            found.started = found.started or await self._probe(found, container.get("startupProbe"))
            found.ready = found.started and await self._probe(found, container.get("readinessProbe"))
            found.looked = time.monotonic()
        return found

    def ended(self, pod: Any) -> bool:
        """Whether the container is no more; it is told to end."""
        found = self.containers.get(pod["metadata"]["uid"])
        if found is None or found.process.returncode is not None:
            return True
        if not found.told:
            found.told = True
            found.process.send_signal(signal.SIGTERM)
        return False

    async def close(self) -> None:
        living = [found.process for found in self.containers.values() if found.process.returncode is None]
        for process in living:
            process.send_signal(signal.SIGTERM)
        if living:
            _, late = await asyncio.wait([asyncio.create_task(process.wait()) for process in living], timeout=GRACE)
            for process in living if late else ():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    async def _start(self, pod: Any, container: Any, number: int) -> Running:
        name = pod["metadata"]["name"]
        folder = self.kubeconfig.parent / f"{name}-{number}"
        folder.mkdir(exist_ok=True)
        fields = {"metadata.name": name, "status.podIP": ADDRESS}
        environment = {entry["name"]: fields[entry["valueFrom"]["fieldRef"]["fieldPath"]] if "valueFrom" in entry else entry["value"] for entry in container["env"]}
        ports: dict[str, int] = {}
        for port in container.get("ports", ()):
            setting = PORTS[port["name"]]
            ports[port["name"]] = int(environment.setdefault(setting, str(free_port())))
        environment["KUBECONFIG"] = str(await self._credentials(pod["spec"]["serviceAccountName"], folder))
        words = await self._mounted(pod, container, folder)
        assert words[0] == "dynamo"
        with (folder / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "dynamo_core.cli", *words[1:], cwd=folder, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, **environment, "DYNAMO_SUPERVISED": str(os.getpid())})
        (folder / "pid").write_text(str(process.pid))
        return Running(process, ports, number)

    async def _mounted(self, pod: Any, container: Any, folder: Path) -> list[str]:
        """The command, with the files of ConfigMaps where this machine has them."""
        maps = {volume["name"]: volume["configMap"]["name"] for volume in pod["spec"].get("volumes", ()) if "configMap" in volume}
        words = list(container["command"])
        for mount in container.get("volumeMounts", ()):
            if mount["name"] in maps:
                found = await self.kube.call("GET", self.kube.path("v1", "configmaps", maps[mount["name"]]))
                file = folder / mount["subPath"]
                file.write_text(found["data"][mount["subPath"]])
                words = [str(file) if word == mount["mountPath"] else word for word in words]
        return words

    async def _credentials(self, account: str, folder: Path) -> Path:
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": [], "expirationSeconds": 3600}}
        answer = await self.kube.call("POST", self.kube.path("v1", "serviceaccounts", account, "token"), body)
        content = json.loads(self.kubeconfig.read_text())
        content["users"][0]["user"] = {"token": answer["status"]["token"]}
        path = folder / "kubeconfig"
        path.write_text(json.dumps(content))
        return path

    async def _probe(self, found: Running, probe: Any) -> bool:
        if probe is None:
            return True
        url = f"http://{ADDRESS}:{found.ports[probe['httpGet']['port']]}{probe['httpGet']['path']}"

        def ask() -> bool:
            try:
                with urllib.request.urlopen(url, timeout=2) as answer:
                    return answer.status == 200
            except OSError:
                return False

        return await asyncio.to_thread(ask)
