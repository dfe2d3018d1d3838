"""`/debug/...`: why a request went where it went, and who is there. No prompts, no secrets; off with `frontend.debug_routes = false`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dynamo_core.errors import Forbidden, RequestError
from dynamo_core.frontend.replies import reply
from dynamo_core.frontend.service import Service
from dynamo_core.pipeline.contract import Catalog, Chained


async def decision(service: Service, request: Request) -> Response:
    """By decision id or request id, while the ring of the process that made it holds it."""
    await allow(service, request)
    id, siblings = request.path_params["id"], service.metrics.siblings
    record = await explained(service.catalog, id)
    if record is None and siblings is not None:
        record = await siblings.decision(id)
    if record is None:
        raise HTTPException(404)
    return reply(record)


async def explained(catalog: Catalog, id: str) -> Mapping[str, Any] | None:
    """A decision of this process, with what the worker decided further."""
    record = catalog.decision(id)
    if record is not None and isinstance(catalog, Chained) and (further := await catalog.further(id)):
        return {**record, "further": further, "text": "\n\n".join(str(one.get("text", "")) for one in (record, *further))}
    return record


async def decisions(service: Service, request: Request) -> Response:
    """The latest ones, newest first, in a line each: `?limit=100&since=UNIX_TIME`."""
    await allow(service, request)
    try:
        limit, since = int(request.query_params.get("limit", "100")), float(request.query_params.get("since", "0"))
    except ValueError:
        raise RequestError("limit is a whole number, and since a Unix time") from None
    return reply({"decisions": service.catalog.decisions(limit, since)})


async def fleet(service: Service, request: Request) -> Response:
    await allow(service, request)
    return reply(service.catalog.status())


async def routers(service: Service, request: Request) -> Response:
    """What each router knows of each worker: health, and every fact."""
    await allow(service, request)
    return reply(service.catalog.routers())


async def allow(service: Service, request: Request) -> None:
    """:raises Unauthorized: nobody known. :raises Forbidden: somebody, but no administrator."""
    if request.scope.get("admin"):
        return  # came in by the operators' own address, which has its own key
    principal = await service.authenticate(request.scope["headers"])
    if principal is not None and not principal.admin:
        raise Forbidden("this needs the key of an administrator")
