"""`/debug/...`: why a request went where it went, and who is there. No prompts, no secrets; off with `frontend.debug_routes = false`."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dynamo_core.frontend.replies import reply
from dynamo_core.frontend.service import Service


async def decision(service: Service, request: Request) -> Response:
    """By decision id or request id, while the ring holds it."""
    await service.authenticate(request.scope["headers"])
    record = service.catalog.decision(request.path_params["id"])
    if record is None:
        raise HTTPException(404)
    return reply(record)


async def fleet(service: Service, request: Request) -> Response:
    await service.authenticate(request.scope["headers"])
    return reply(service.catalog.status())
