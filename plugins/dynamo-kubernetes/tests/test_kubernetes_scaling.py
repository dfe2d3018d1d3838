"""The connector among others who write: people, autoscalers, rollouts, an operator that is late, and servers that refuse."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from dynamo_core.ending import ended
from dynamo_core.errors import ConfigError, ConnectorUnavailable, ScaleRefused
from dynamo_kubernetes.api import JSON_PATCH, Unreachable
from dynamo_kubernetes.connector import KubernetesConnector

pytestmark = pytest.mark.slow


@pytest.fixture
async def connected(api_server, kube):
    """`await connected(**options)`: a connector to the graph `chat`."""
    async with contextlib.AsyncExitStack() as stack:

        async def connect(**options):
            options = {"graph": "chat", "stuck_after": 0.2, "verify_timeout": 10.0, **options}
            connector = KubernetesConnector(api_server.kubeconfig(namespace=kube.namespace), **options)
            await connector.start()
            stack.push_async_callback(connector.close)
            return connector

        yield connect


# ------------------------------------------------------------------ other writers


async def test_a_change_by_somebody_else_is_told_and_not_undone(graph, connected, controllers) -> None:
    await graph.make()
    await graph.adapt("decode", 2)
    controllers("operator")
    connector = await connected(yield_for=2.0)
    await graph.merge(graph.adapter("decode"), {"spec": {"replicas": 7}}, manager="an-autoscaler")
    with pytest.raises(ScaleRefused, match="an-autoscaler changed decode from 2 to 7"):
        await connector.scale({"decode": 3}, reason="what was seen is old")
    assert (await connector.observe())["decode"].desired == 7
    with pytest.raises(ScaleRefused, match="left alone for another"):
        await connector.scale({"decode": 3, "prefill": 1}, reason="too early")
    await connector.scale({"decode": 7, "prefill": 1}, reason="which is no change of what it says")
    assert await graph.replicas() == {"prefill": 1, "decode": 7}
    await asyncio.sleep(2.0)
    await connector.scale({"decode": 3}, reason="they had their time")
    assert (await connector.observe())["decode"].desired == 3


async def test_conflicts_with_writers_of_other_fields_are_retried(graph, connected, controllers) -> None:
    await graph.make()
    for role in ("prefill", "decode"):
        await graph.adapt(role)
    controllers("operator")
    connector = await connected()

    async def scribble() -> None:
        for number in range(10**6):
            for role in ("prefill", "decode"):
                await graph.merge(graph.adapter(role), {"metadata": {"annotations": {"scribble": str(number)}}})
            await asyncio.sleep(0.03)

    scribbling = asyncio.create_task(scribble())
    try:
        for count in (1, 2, 3):
            await connector.scale({"prefill": count, "decode": count}, reason="among scribblers")
            assert await graph.replicas() == {"prefill": count, "decode": count}
    finally:
        await ended(scribbling)


async def test_who_is_overtaken_between_reading_and_writing_does_not_overwrite(graph, connected, controllers) -> None:
    await graph.make()
    await graph.adapt("prefill", 2)
    await graph.adapt("decode", 2)
    controllers("operator")
    connector = await connected()
    read = connector._source.read
    overtaken: list[bool] = []

    async def read_and_be_overtaken(kube):
        found = await read(kube)
        if not overtaken:
            overtaken.append(True)
            await graph.merge(graph.adapter("decode"), {"spec": {"replicas": 6}}, manager="ann")
        return found

    connector._source = type("Overtaken", (), {"read": staticmethod(read_and_be_overtaken)})()
    with pytest.raises(ScaleRefused, match="ann changed decode from 2 to 6"):
        await connector.scale({"decode": 3, "prefill": 1}, reason="two were seen")
    assert {role: state.desired for role, state in (await connector.observe()).items()} == {"prefill": 2, "decode": 6}


async def test_a_graph_without_adapters_is_written_itself_and_says_so(graph, connected, caplog) -> None:
    await graph.make(nodes=2)
    connector = await connected()
    await connector.scale({"prefill": 3, "decode": 1}, reason="no adapter")
    assert await graph.replicas() == {"prefill": 3, "decode": 1}
    await connector.scale({"prefill": 1, "decode": 2}, reason="both in one request")
    assert await graph.replicas() == {"prefill": 1, "decode": 2}
    assert (await connector.observe())["decode"].gpus_per_replica == 4
    told = [record.message for record in caplog.records if "has no scaling adapter" in record.message]
    assert len(told) == 2, "once for each component"


async def test_an_adapter_that_is_removed_makes_the_graph_the_place_to_write(graph, kube, connected, controllers) -> None:
    await graph.make()
    await graph.adapt("decode", 1)
    controllers("operator")
    connector = await connected()
    await connector.scale({"decode": 2}, reason="by the adapter")
    await kube.call("DELETE", graph.adapter("decode"))
    await connector.scale({"decode": 3}, reason="by the graph")
    assert (await graph.replicas())["decode"] == 3


async def test_a_component_that_moved_in_the_list_is_still_the_one_that_is_scaled(graph, kube, connected) -> None:
    await graph.make()
    connector = await connected()
    read = connector._source.read

    async def read_and_be_overtaken(kube):
        found = await read(kube)
        if not (moved := kube_moved):
            moved.append(True)
            remove = [{"op": "move", "from": "/spec/components/0", "path": "/spec/components/2"}]
            await kube.call("PATCH", graph.path, remove, content_type=JSON_PATCH)
        return found

    kube_moved: list[bool] = []
    connector._source = type("Overtaken", (), {"read": staticmethod(read_and_be_overtaken)})()
    await connector.scale({"prefill": 4}, reason="the list was reordered between read and write")
    components = (await kube.call("GET", graph.path))["spec"]["components"]
    assert [(c["name"], c["replicas"]) for c in components] == [("prefill", 4), ("decode", 0), ("Frontend", 1)]


async def test_nothing_is_scaled_during_a_rolling_update(graph, kube, connected) -> None:
    await graph.make()
    connector = await connected(verify_timeout=0.5)
    await graph.merge(f"{graph.path}/status", {"status": {"rollingUpdate": {"phase": "InProgress"}}})
    with pytest.raises(ConnectorUnavailable, match="a rolling update of chat is in progress"):
        await connector.scale({"decode": 1}, reason="meanwhile")
    assert (await graph.replicas())["decode"] == 0
    await graph.merge(f"{graph.path}/status", {"status": {"rollingUpdate": {"phase": "Completed"}}})
    await connector.scale({"decode": 1}, reason="afterwards")


async def test_a_write_whose_answer_was_lost_is_not_taken_for_somebody_elses(graph, connected) -> None:
    await graph.make()
    connector = await connected()
    call = connector._kube.call

    async def lose_the_answer(method, path, *arguments, **options):
        answer = await call(method, path, *arguments, **options)
        if method == "PATCH" and "dryRun" not in options:
            connector._kube.call = call
            raise Unreachable("the connection broke")
        return answer

    connector._kube.call = lose_the_answer
    with pytest.raises(ConnectorUnavailable, match="the connection broke"):
        await connector.scale({"decode": 3}, reason="it arrives, and nobody says so")
    assert (await connector.observe())["decode"].desired == 3
    await connector.scale({"decode": 4}, reason="the next decision")
    assert (await connector.observe())["decode"].desired == 4


# ------------------------------------------------------------------ what a write becomes


async def test_of_two_changes_none_is_made_when_one_is_refused(graph, connected, controllers) -> None:
    await graph.make()
    for role in ("prefill", "decode"):
        await graph.adapt(role, 2)
    controllers("operator")
    connector = await connected()
    with pytest.raises(ScaleRefused, match="100"):
        await connector.scale({"prefill": 1, "decode": 101}, reason="more than the resource allows")
    assert {role: state.desired for role, state in (await connector.observe()).items()} == {"prefill": 2, "decode": 2}


async def test_an_operator_that_does_not_run_is_named(graph, connected) -> None:
    await graph.make()
    await graph.adapt("decode")
    connector = await connected(verify_timeout=0.5)
    with pytest.raises(ConnectorUnavailable, match="component decode: the scaling adapter took the number.*does the operator run"):
        await connector.scale({"decode": 2}, reason="nobody carries it on")


async def test_waiting_until_stable_has_a_bound_and_says_what_is_missing(graph, kube, connected, controllers) -> None:
    await graph.make(nodes=2)
    controllers("scheduler", "kubelet", "operator")
    connector = await connected(wait_stable=30.0)
    await connector.scale({"prefill": 2}, reason="two replicas of two pods")
    assert (await connector.observe())["prefill"].stable
    events, _ = await kube.listing(kube.path("v1", "events"))
    assert [event["message"] for event in events] == ["prefill 0 -> 2: two replicas of two pods"]
    await kube.call("POST", kube.path("v1", "configmaps"), {"metadata": {"name": "no-room"}, "data": {"prefill": ""}})
    connector.wait_stable = 1.5
    with pytest.raises(ConnectorUnavailable, match=r"not stable after 1\.5 s: prefill: 2 of 3 ready, 0 draining, 1 stuck"):
        await connector.scale({"prefill": 3}, reason="no room")


async def test_a_replica_of_several_pods_is_ready_when_all_of_them_are(graph, kube, connected, controllers, until) -> None:
    await graph.make(nodes=2, replicas=1)
    stop = controllers("scheduler", "operator")
    connector = await connected()

    async def pods():
        return (await kube.listing(kube.path("v1", "pods"), labelSelector="role=prefill"))[0]

    async def both_there():
        return len(await pods()) == 2

    await until(both_there)
    for count, pod in enumerate(await pods(), start=1):
        ready = {"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}}
        await graph.merge(kube.path("v1", "pods", pod["metadata"]["name"], "status"), ready)
        state = (await connector.observe())["prefill"]
        assert (state.ready, state.starting, state.stable) == ((1, 0, True) if count == 2 else (0, 1, False))
    stop()
    waiting = {"status": {"conditions": [{"type": "Ready", "status": "False"}], "phase": "Pending", "containerStatuses": [
        {"name": "main", "ready": False, "restartCount": 4, "image": "", "imageID": "", "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}}
    await graph.merge(kube.path("v1", "pods", (await pods())[0]["metadata"]["name"], "status"), waiting)
    state = (await connector.observe())["prefill"]
    assert (state.ready, state.starting, state.reducible) == (0, 1, 0), "it may still recover"

    async def given_up():
        return (await connector.observe())["prefill"].reducible == 1

    await until(given_up)


# ------------------------------------------------------------------ options that cannot work


@pytest.mark.parametrize(("options", "complaint"), [
    ({"graph": None}, "set one of `graph` and `selector`"),
    ({"selector": "app=chat"}, "set one of `graph` and `selector`"),
    ({"graph": "no-such"}, "there is no DynamoGraphDeployment 'no-such'"),
    ({"graph": None, "selector": "app=nothing"}, "no Deployment or LeaderWorkerSet with app=nothing"),
    ({"components": {"decode": "Decoder"}}, "has no component 'Decoder'; it has Frontend, prefill, decode"),
])
async def test_options_that_do_not_fit_the_cluster_are_the_operators_mistake(graph, connected, options, complaint) -> None:
    await graph.make()
    with pytest.raises(ConfigError, match=complaint):
        await connected(**options)


async def test_whoever_may_not_read_is_told_what_to_bind(graph, api_server, kube) -> None:
    await graph.make()
    connector = KubernetesConnector(api_server.kubeconfig("nobody-token", namespace=kube.namespace), graph="chat")
    with pytest.raises(ConfigError, match="(?s)refuses the planner: .*cannot get resource.*bind the planner's role"):
        await connector.start()
