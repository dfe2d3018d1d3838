"""Where things live in the discovery store. Every key of the system is made here.

    v1/instances/<namespace>/<component>/<endpoint>/<id hex>    an Instance
    v1/models/<namespace>/<component>/<endpoint>/<id hex>       the ModelCard of that instance
    v1/events/<topic>/<id hex>                                  an event publisher (written by the event plane)
    v1/status/<namespace>/<role>/<id hex>                       URL of a process's status endpoint
    v1/cold/<namespace>/<model>/<id hex>                        a ColdModel: workers of it can be started
    v1/demand/<namespace>/<model>/<id hex>                      the Demand of a frontend that holds requests for it
"""

from __future__ import annotations

from urllib.parse import quote

from dynamo_core.types import Instance

GENERATE = "generate"
"""The endpoint that streams tokens."""
ADAPTER_MARK = "@"
"""`generate@name` is the record of an adapter that an instance of `generate` serves as well; requests go to `generate`."""
ARTIFACT = "artifact"
"""Serves the files that a model card names, by digest."""
PROBE = "probe"
"""Runs a canary through the engine."""
CONTROL = "control"
"""Operator actions of the engine: sleep, wake, profile, ..."""

KV_STATE = "kv_state"
"""Sends news of the KV cache again, or the whole picture: `dynamo_core.kv.wire`."""


def instances(namespace: str) -> str:
    return f"v1/instances/{namespace}/"


def models(namespace: str) -> str:
    return f"v1/models/{namespace}/"


def of_instance(instance: Instance) -> str:
    return f"v1/instances/{instance.namespace}/{instance.component}/{instance.endpoint}/{instance.id:016x}"


def generate(adapter: str | None) -> str:
    """The endpoint under which a model, or one of its adapters, stands in discovery."""
    return GENERATE if adapter is None else f"{GENERATE}{ADAPTER_MARK}{quote(adapter, safe='')}"


def of_card(instance: Instance) -> str:
    return f"v1/models/{instance.namespace}/{instance.component}/{instance.endpoint}/{instance.id:016x}"


def of_status(namespace: str, role: str, id: int) -> str:
    return f"v1/status/{namespace}/{role}/{id:016x}"


def cold(namespace: str) -> str:
    return f"v1/cold/{namespace}/"


def of_cold(namespace: str, model: str, id: int) -> str:
    return f"v1/cold/{namespace}/{quote(model, safe='')}/{id:016x}"


def demand(namespace: str) -> str:
    return f"v1/demand/{namespace}/"


def of_demand(namespace: str, model: str, id: int) -> str:
    return f"v1/demand/{namespace}/{quote(model, safe='')}/{id:016x}"


def tail(key: str) -> str:
    """What an instance key and its card key have in common."""
    return key.split("/", 2)[2]


def topic(namespace: str, component: str, name: str) -> str:
    """An event topic of a component: `<namespace>/<component>/load`."""
    return f"{namespace}/{component}/{name}"
