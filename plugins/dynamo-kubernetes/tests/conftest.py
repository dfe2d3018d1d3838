"""A real API server on a real etcd, namespaces of their own for the tests, and whoever else a cluster has: see `controllers.py`."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from dynamo_core.testing.servers import Authority, Cluster, Node, free_port
from dynamo_kubernetes.access import find
from dynamo_kubernetes.api import MERGE_PATCH, Kube, Refused

HERE = Path(__file__).parent
DEPLOY = HERE.parents[2] / "deploy"
PLURALS = {"ServiceAccount": "serviceaccounts", "Role": "roles", "RoleBinding": "rolebindings", "ConfigMap": "configmaps", "Deployment": "deployments",
           "LeaderWorkerSet": "leaderworkersets", "Service": "services", "PodDisruptionBudget": "poddisruptionbudgets"}
GUARD = 40.0
_numbers = itertools.count()


def program() -> str:
    cache = Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "dynamo-tests"
    found = [Path(path) for path in (os.environ.get("KUBE_APISERVER"), *sorted(cache.glob("kube-apiserver-*[0-9]"))) if path]
    if not found:
        raise RuntimeError("these tests need a kube-apiserver: run `make kube-apiserver` once")
    return str(found[-1])


class ApiServer(Cluster):
    """One kube-apiserver with RBAC. Tokens: `admin` may do everything, `nobody` nothing."""

    def __init__(self, folder: Path, etcd: str, authority: Authority) -> None:
        folder.mkdir(parents=True)
        self.folder, self.ca = folder, authority.cert
        self.port = free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        cert, key = authority.issue("kube-apiserver")
        signing = folder / "sa.key"
        subprocess.run(["openssl", "genrsa", "-out", str(signing), "2048"], check=True, capture_output=True)
        tokens = folder / "tokens.csv"
        tokens.write_text('admin-token,admin,1,"system:masters"\nnobody-token,nobody,2\n')
        self.nodes = [Node([
            program(), f"--etcd-servers={etcd}", f"--etcd-prefix=/{folder.name}", f"--secure-port={self.port}", "--bind-address=127.0.0.1",
            f"--tls-cert-file={cert}", f"--tls-private-key-file={key}", f"--client-ca-file={authority.cert}", f"--cert-dir={folder}",
            f"--service-account-key-file={signing}", f"--service-account-signing-key-file={signing}",
            "--service-account-issuer=https://kubernetes.default.svc", f"--token-auth-file={tokens}", "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.0.0.0/24", "--disable-admission-plugins=ServiceAccount", "--allow-privileged=true", "--v=1",
        ], folder / "data", folder / "log")]
        self.start()

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=2, context=ssl.create_default_context(cafile=self.ca)) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kubeconfig(self, token: str = "admin-token", *, port: int | None = None, namespace: str = "default", user: dict[str, Any] | None = None) -> Path:
        path = self.folder / f"kubeconfig-{next(_numbers)}"
        path.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "it", "user": "me", "namespace": namespace}}],
            "clusters": [{"name": "it", "cluster": {"server": f"https://127.0.0.1:{port or self.port}", "certificate-authority": str(self.ca)}}],
            "users": [{"name": "me", "user": user if user is not None else {"token": token}}],
        }))
        return path


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory, etcd_server, authority: Authority) -> Iterator[ApiServer]:
    server = ApiServer(tmp_path_factory.mktemp("kubernetes") / "server", etcd_server().endpoints[0], authority)
    yield server
    server.kill()


@pytest.fixture
async def kube(api_server: ApiServer) -> AsyncIterator[Kube]:
    """An administrator of a namespace that nobody else uses."""
    if not api_server.nodes[0].running:
        await asyncio.to_thread(api_server.start)  # if the test before left it down
    namespace = f"test-{os.getpid()}-{next(_numbers)}"
    async with Kube(find(api_server.kubeconfig(), None, namespace), 15.0, agent="administrator") as kube:
        await kube.call("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
        yield kube


class Stage:
    """`controllers.py`, loaded once."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, str(HERE / "controllers.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def say(self, *words: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.communicate(timeout=GUARD)


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


@pytest.fixture
def controllers(api_server: ApiServer, kube: Kube, stage: Stage) -> Iterator[Callable[..., Callable[[], None]]]:
    """`stop = controllers("kubelet", "operator")` plays these roles for the namespace, in a process of its own, until the test ends or `stop()`."""
    with ExitStack() as stack:

        def start(*roles: str) -> Callable[[], None]:
            running = [stage.say("start", str(api_server.kubeconfig(namespace=kube.namespace)), *roles)]

            def stop() -> None:
                while running:
                    assert stage.say("stop", running.pop()) == "stopped"

            stack.callback(stop)
            return stop

        yield start


@pytest.fixture(scope="session")
def helm() -> str:
    return subprocess.run([str(HERE / "helm.sh")], check=True, capture_output=True, text=True).stdout.split()[-1]


@pytest.fixture
def render(helm: str, documents: Callable[[str], list[Any]]) -> Callable[..., list[Any]]:
    """`render("chat", "frontend.replicas=1")`: the objects of the chart in that namespace, and its stack files."""

    def template(namespace: str, *values: str) -> list[Any]:
        command = [helm, "template", "fleet", str(DEPLOY / "chart"), "--namespace", namespace,
                   *(word for value in values for word in ("--set-json" if "={" in value or "=[" in value else "--set", value))]
        return documents(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    return template


@pytest.fixture(scope="session")
def documents() -> Callable[[str], list[Any]]:
    return lambda text: [document for document in YAML(typ="safe", pure=True).load_all(io.StringIO(text)) if document]


@pytest.fixture
def apply(kube: Kube) -> Callable[..., Any]:
    """`await apply(document)`: what `kubectl apply --server-side` does; `dryRun="All"` to be told only whether it would."""

    async def send(document: Any, **params: str) -> None:
        api = document["apiVersion"]
        if document["kind"] == "PodDisruptionBudget":
            api = document["apiVersion"] = "policy/v1beta1"  # the server of the tests is older than policy/v1, whose fields are the same
        path = kube.path(api, PLURALS[document["kind"]], document["metadata"]["name"])
        await kube.call("PATCH", path, document, content_type="application/apply-patch+yaml", fieldManager="deploy", force="true", **params)

    return send


@pytest.fixture
def until() -> Callable[..., Any]:
    """`await until(condition)`: some controller or other needs a moment."""

    async def wait(condition: Callable[[], Any]) -> Any:
        async with asyncio.timeout(GUARD):
            while not (found := await condition()):
                await asyncio.sleep(0.1)
            return found

    return wait


@pytest.fixture(scope="session")
def custom_resources(api_server: ApiServer) -> None:
    """The custom resource definitions of `crds/`, served."""

    async def install() -> None:
        async with Kube(find(api_server.kubeconfig(), None, None), 15.0) as kube:
            for file in sorted((HERE / "crds").glob("*.json")):
                definition = json.loads(file.read_text())
                await kube.call("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)
                group, version = definition["spec"]["group"], definition["spec"]["versions"][0]["name"]
                async with asyncio.timeout(GUARD):
                    while True:
                        try:
                            await kube.call("GET", kube.path(f"{group}/{version}", definition["spec"]["names"]["plural"]))
                            break
                        except Refused:
                            await asyncio.sleep(0.1)

    asyncio.run(install())


@pytest.fixture
def gpu_pod() -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "main", "image": "none", "resources": {"limits": {"nvidia.com/gpu": "2"}}}]}}


class Graph:
    """A DynamoGraphDeployment `chat` with a frontend, `prefill` and `decode`, and what others do to it."""

    API = "nvidia.com/v1beta1"

    def __init__(self, kube: Kube, pod: dict[str, Any]) -> None:
        self._kube, self._pod = kube, pod
        self.path = kube.path(self.API, "dynamographdeployments", "chat")

    async def make(self, nodes: int = 1, replicas: int = 0) -> None:
        more = {"podTemplate": self._pod, **({"multinode": {"nodeCount": nodes}} if nodes > 1 else {})}
        await self.of({"name": "Frontend", "type": "frontend", "replicas": 1}, *({"name": role, "type": role, "replicas": replicas, **more} for role in ("prefill", "decode")))

    async def of(self, *components: dict[str, Any]) -> None:
        body = {"apiVersion": self.API, "kind": "DynamoGraphDeployment", "metadata": {"name": "chat"}, "spec": {"components": components}}
        await self._kube.call("POST", self._kube.path(self.API, "dynamographdeployments"), body)

    def adapter(self, component: str, subresource: str = "") -> str:
        return self._kube.path(self.API, "dynamographdeploymentscalingadapters", f"chat-{component}", subresource)

    async def adapt(self, component: str, replicas: int = 0) -> None:
        body = {"apiVersion": self.API, "kind": "DynamoGraphDeploymentScalingAdapter", "metadata": {"name": f"chat-{component}"},
                "spec": {"replicas": replicas, "dgdRef": {"name": "chat", "componentName": component}}}
        await self._kube.call("POST", self._kube.path(self.API, "dynamographdeploymentscalingadapters"), body)

    async def merge(self, path: str, body: Any, manager: str = "somebody") -> None:
        await self._kube.call("PATCH", path, body, content_type=MERGE_PATCH, fieldManager=manager)

    async def replicas(self) -> dict[str, int]:
        """What the graph itself says."""
        return {c["name"]: c["replicas"] for c in (await self._kube.call("GET", self.path))["spec"]["components"] if c["name"] != "Frontend"}


@pytest.fixture
def graph(kube: Kube, custom_resources: None, gpu_pod: dict[str, Any]) -> Graph:
    return Graph(kube, gpu_pod)
