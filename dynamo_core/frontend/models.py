"""`GET /v1/models` and `/v1/models/{id}`: only models that can be used now, or waited for."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dynamo_core.frontend.replies import reply
from dynamo_core.frontend.service import Service
from dynamo_core.pipeline.contract import Model


async def all_models(service: Service, request: Request) -> Response:
    await service.authenticate(request.scope["headers"])
    models = service.catalog.models()
    names = {model.name: model for model in models}
    aliases = {name: model for model in models for name in model.card.aliases if name not in names}
    entries = [_entry(model, name) for name, model in (names | aliases).items()]
    cold = [_cold(name) for name in service.holding.cold()] if service.holding is not None else []
    return reply({"object": "list", "data": entries + cold})


async def one_model(service: Service, request: Request) -> Response:
    """:raises ModelNotFound: 404. :raises Unavailable: known but not ready, 503 with what is missing."""
    await service.authenticate(request.scope["headers"])
    name: str = request.path_params["id"]
    if service.holding is not None and name in service.holding.cold():
        return reply(_cold(name))
    return reply(_entry(service.catalog.get(name), name))


def _entry(model: Model, name: str) -> dict[str, Any]:
    card = model.card
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "dynamo",
        "root": model.name,
        "context_window": card.context_length,
        "max_model_len": card.context_length,
        "surfaces": card.surfaces,
        "capabilities": card.capabilities,
    }


def _cold(name: str) -> dict[str, Any]:
    """A model that the first request for it starts: more is not known before."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "dynamo", "root": name, "status": "cold"}
