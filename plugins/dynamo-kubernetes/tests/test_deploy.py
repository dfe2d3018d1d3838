"""deploy/ against a real API server: every manifest is accepted, the roles allow what is done and no more, the configuration loads."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dynamo_core.config import load_with_plugins
from dynamo_core.errors import ConfigError, ScaleRefused
from dynamo_kubernetes import access
from dynamo_kubernetes.api import Kube, Refused, Unreachable
from dynamo_kubernetes.connector import KubernetesConnector
from dynamo_kubernetes.discovery import KubernetesDiscovery

pytestmark = pytest.mark.slow

DEPLOY = Path(__file__).parents[3] / "deploy"
PROMETHEUS = "planner.config.metrics.prometheus=http://prometheus:9090"
VARIANTS = {
    "defaults": [],
    "everything": ["planner.enabled=true", PROMETHEUS, "router.enabled=true", "frontend.disruptionBudget=true", "frontend.secrets[0]=api-keys",
                   "workers[0].name=backend", "workers[0].role=aggregated", "workers[0].engine.use=sim", "workers[0].replicas=0", "workers[0].env[0].name=A",
                   "workers[0].env[0].value=b", "workers[0].nodeSelector.gpu=h100", "imagePullSecrets[0].name=pull",
                   'workers[0].resources.limits={"nvidia.com/gpu": "2"}', "podAnnotations.team=a",
                   "planner.config.record=/record/decisions.jsonl", 'planner.volumes=[{"name": "record", "persistentVolumeClaim": {"claimName": "record"}}]',
                   'planner.volumeMounts=[{"name": "record", "mountPath": "/record"}]', "planner.nodeSelector.zone=a", "router.nodeSelector.zone=a"],
    "graph": ["planner.enabled=true", "planner.graph=chat", "frontend.replicas=1"],
    "two-roles": ["planner.enabled=true", PROMETHEUS, "workers[0].name=prefill", "workers[0].role=prefill", "workers[0].engine.use=sim",
                  "workers[1].name=decode", "workers[1].role=decode", "workers[1].engine.use=sim", "workers[1].replicas=3"],
    "several-nodes": ["planner.enabled=true", PROMETHEUS, "workers[0].name=prefill", "workers[0].role=prefill", "workers[0].engine.use=sim",
                      "workers[1].name=decode", "workers[1].role=decode", "workers[1].engine.use=sim", "workers[1].nodes=2", "workers[1].prepare=ray start --head",
                      'workers[1].followerCommand=["ray", "start", "--block"]', 'workers[1].resources.limits={"nvidia.com/gpu": "8"}'],
}


def templates(document: Any) -> list[Any]:
    """Of the pods of a workload; none for other objects."""
    spec = document.get("spec", {})
    if document["kind"] == "LeaderWorkerSet":
        return [spec["leaderWorkerTemplate"]["leaderTemplate"], spec["leaderWorkerTemplate"]["workerTemplate"]]
    return [spec["template"]] if document["kind"] == "Deployment" else []


# ------------------------------------------------------------------ accepted


@pytest.mark.parametrize("variant", VARIANTS)
async def test_every_object_of_the_chart_and_every_pod_of_it_is_accepted_by_the_server(render, kube, apply, custom_resources, variant) -> None:
    objects = render(kube.namespace, *VARIANTS[variant])
    assert {"Deployment", "Service", "ConfigMap", "Role", "RoleBinding", "ServiceAccount"} <= {document["kind"] for document in objects}
    assert ("LeaderWorkerSet" in {document["kind"] for document in objects}) == (variant == "several-nodes")
    for document in objects:
        await apply(document, dryRun="All")
        for template in templates(document):  # which a custom resource takes unread
            await kube.call("POST", kube.path("v1", "pods"), {**template, "metadata": {**template["metadata"], "name": "any"}}, dryRun="All")


async def test_an_object_with_a_wrong_field_is_not_accepted(render, kube, apply) -> None:
    deployment = next(document for document in render(kube.namespace) if document["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises((Refused, Unreachable), match="readynessProbe"):  # this server calls it an error of its own
        await apply(deployment, dryRun="All")


async def test_the_plain_manifests_are_what_the_chart_gives(helm, documents, tmp_path, apply) -> None:
    fresh = tmp_path / "dynamo.yaml"
    await asyncio.to_thread(subprocess.run, [str(DEPLOY / "render.sh"), helm, str(fresh)], check=True)
    written = (DEPLOY / "manifests" / "dynamo.yaml").read_text()
    assert written == fresh.read_text(), "run deploy/render.sh"
    for document in documents(written):
        await apply(document, dryRun="All")


@pytest.mark.parametrize(("values", "said"), [
    ({"workers": [{"role": "aggregated", "engine": {"use": "sim"}}]}, "every pool of `workers` needs a name"),
    ({"workers": [{"name": "d", "role": "decode", "engine": {"use": "sim"}, "nodes": 2}]}, "pool d has several nodes: say what runs beside the worker"),
])
def test_pools_that_cannot_run_are_refused_with_the_reason(helm, values, said, tmp_path) -> None:
    (tmp_path / "values.json").write_text(json.dumps(values))
    done = subprocess.run([helm, "template", "fleet", str(DEPLOY / "chart"), "--values", str(tmp_path / "values.json")], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert said in done.stderr


def test_several_frontends_without_a_prometheus_are_refused_with_the_remedy(helm) -> None:
    command = [helm, "template", "fleet", str(DEPLOY / "chart"), "--set", "planner.enabled=true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "set planner.config.metrics.prometheus, or frontend.replicas=1" in done.stderr


# ------------------------------------------------------------------ what the roles read and run


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_stacks_in_the_config_map_load(render, variant) -> None:
    files = next(document for document in render("here", *VARIANTS[variant]) if document["kind"] == "ConfigMap")["data"]
    assert set(files) == ({"stack.yaml"} if variant == "defaults" else {"stack.yaml", "planner.yaml"})
    for name, text in files.items():
        config, _ = load_with_plugins(path=Path(name), text=text, environ={})
        assert config.discovery.name == "kubernetes"
        assert config.discovery.options["store"] == "fleet"
        assert (config.planner is not None) == (name == "planner.yaml")


def test_the_values_in_the_documentation_give_stacks_that_load(helm, documents, tmp_path) -> None:
    page = (DEPLOY.parent / "docs" / "how-to" / "run-on-kubernetes.md").read_text()
    values = tmp_path / "values.yaml"
    values.write_text(re.findall(r"```yaml\n(.*?)```", page, re.S)[0])
    command = [helm, "template", "chat", str(DEPLOY / "chart"), "--values", str(values)]
    objects = documents(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    files = next(document for document in objects if document["kind"] == "ConfigMap")["data"]
    config, _ = load_with_plugins(path=Path("planner.yaml"), text=files["planner.yaml"], environ={"KV_SECRET": "of the Secret"})
    assert config.kv.secret == "of the Secret"
    for deployment in (document for document in objects if document["kind"] == "Deployment"):
        assert "KV_SECRET" in {entry["name"] for entry in deployment["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert config.planner is not None
    assert config.planner.options["roles"] == ["prefill", "decode"]


def test_the_connectors_in_the_documentation_are_connectors() -> None:
    pages = (DEPLOY.parent / "docs" / "how-to" / "run-on-kubernetes.md", Path(__file__).parents[1] / "README.md")
    samples = [text for page in pages for text in re.findall(r"```toml\n(.*?)```", page.read_text(), re.S)]
    assert len(samples) == 3
    for text in samples:
        planner = '[planner]\nuse = "standard"\nmetrics = { frontends = ["http://127.0.0.1:1"] }\n' if "[planner" in text else ""
        config, _ = load_with_plugins(text=planner + text, environ={})
        assert (config.planner.options["connector"]["use"] if config.planner else config.discovery.name) == "kubernetes"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pod_has_the_time_that_it_needs_to_drain_and_asks_for_no_privilege(render, variant) -> None:
    objects = render("here", *VARIANTS[variant])
    text = next(document for document in objects if document["kind"] == "ConfigMap")["data"]["stack.yaml"]
    config, _ = load_with_plugins(path=Path("stack.yaml"), text=text, environ={})
    drains = {"frontend": config.frontend.drain_timeout + 5, **{f"worker-{worker.name}": worker.drain_timeout for worker in config.workers}}
    for workload in filter(templates, objects):
        for template in templates(workload):
            spec, [container] = template["spec"], template["spec"]["containers"]
            assert spec["terminationGracePeriodSeconds"] >= drains.get(workload["metadata"]["labels"]["app.kubernetes.io/component"], 0) + 10
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
            assert {"POD_NAME", "DYNAMO_CONTAINER", "DYNAMO__HOST"} <= {entry["name"] for entry in container["env"]}
        scaled = "dynamo/role" in workload["metadata"]["labels"] and variant not in ("defaults", "graph")
        assert ("replicas" in workload["spec"]) != scaled, "who is scaled by the planner must not be reset by an upgrade"


# ------------------------------------------------------------------ least privilege


@pytest.fixture
def account(api_server, kube, tmp_path, monkeypatch):
    """`await account("fleet-planner")`: from now on this process is a pod with that service account."""

    async def become(name: str) -> None:
        path = kube.path("v1", "serviceaccounts", name, "token")
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": [], "expirationSeconds": 3600}}
        token = (await kube.call("POST", path, body))["status"]["token"]
        (tmp_path / "token").write_text(token)
        (tmp_path / "namespace").write_text(kube.namespace)
        (tmp_path / "ca.crt").write_bytes(api_server.ca.read_bytes())
        monkeypatch.setattr(access, "SERVICE_ACCOUNT", tmp_path)
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api_server.port))

    return become


async def forbidden(kube: Kube, method: str, path: str, body: Any = None) -> bool:
    try:
        await kube.call(method, path, body)
    except Refused as e:
        return e.code == 403
    return False


async def test_the_fleet_may_meet_and_nothing_else(render, kube, apply, account) -> None:
    for document in render(kube.namespace):
        await apply(document)
    await account("fleet-fleet")
    async with KubernetesDiscovery(store="fleet", pod="") as here, KubernetesDiscovery(store="fleet", pod="") as there, there.watch("k/") as changes:
        lease = await here.lease(3.0)
        await here.put("k/1", b"v", lease)
        await here.put("k/1", b"w", lease)
        async with asyncio.timeout(30):
            async for change in changes:
                if getattr(change, "value", None) == b"w":
                    break
        await asyncio.sleep(3.5)  # its heartbeats are allowed
        assert not lease.lost.is_set()
        assert await there.items("k/") == {"k/1": b"w"}
        await there.delete("k/1")
        await lease.revoke()
    async with Kube(access.find(None, None, None), 5.0) as fleet:
        assert await forbidden(fleet, "GET", fleet.path("v1", "secrets"))
        assert await forbidden(fleet, "GET", fleet.path("apps/v1", "deployments"))
        assert await forbidden(fleet, "DELETE", fleet.path("v1", "pods", "any"))
        assert await forbidden(fleet, "GET", "/api/v1/pods")
    with pytest.raises(ConfigError, match="bind the planner's role"):
        await KubernetesConnector(selector="app.kubernetes.io/instance=fleet").start()


async def test_the_planner_may_scale_its_pools_and_nothing_else(render, kube, apply, custom_resources, account) -> None:
    objects = render(kube.namespace, *VARIANTS["several-nodes"])
    other = {"metadata": {"name": "other", "labels": {"app.kubernetes.io/instance": "fleet", "dynamo/role": "aggregated"}},
             "spec": {"replicas": 1, "selector": {"matchLabels": {"a": "b"}},
                      "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "main", "image": "none"}]}}}}
    await kube.call("POST", kube.path("apps/v1", "deployments"), other)
    for document in objects:
        await apply(document)
    await account("fleet-planner")
    text = next(document for document in objects if document["kind"] == "ConfigMap")["data"]["planner.yaml"]
    config, _ = load_with_plugins(path=Path("planner.yaml"), text=text, environ={})
    assert config.planner is not None
    connector = KubernetesConnector(selector=config.planner.options["connector"]["selector"])
    await connector.start()
    assert {role: state.gpus_per_replica for role, state in (await connector.observe()).items()} == {"prefill": 0, "decode": 16}
    await connector.scale({"prefill": 2, "decode": 4}, reason="it may")
    assert {role: state.desired for role, state in (await connector.observe()).items()} == {"prefill": 2, "decode": 4}
    events, _ = await kube.listing(kube.path("v1", "events"))
    assert {event["message"] for event in events} == {"prefill 1 -> 2: it may", "decode 1 -> 4: it may"}
    await connector.close()
    wider = KubernetesConnector(selector="app.kubernetes.io/instance=fleet")
    await wider.start()
    with pytest.raises(ScaleRefused, match='cannot patch resource "deployments/scale"'):
        await wider.scale({"aggregated": 5, "decode": 5}, reason="not its own")
    assert (await wider.observe())["decode"].desired == 4
    await wider.close()


async def test_the_planner_may_scale_its_graph(render, kube, apply, account, graph, controllers) -> None:
    await graph.make()
    await graph.adapt("decode")
    controllers("operator")
    for document in render(kube.namespace, *VARIANTS["graph"]):
        await apply(document)
    await account("fleet-planner")
    connector = KubernetesConnector(graph="chat")
    await connector.start()
    await connector.scale({"decode": 2, "prefill": 1}, reason="one by its adapter, one in the graph")
    assert await graph.replicas() == {"prefill": 1, "decode": 2}
    await connector.close()
