"""`/openapi.json` and `/docs`, generated from the very types that decode the requests."""

from __future__ import annotations

import html
from functools import cache
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from dynamo_core import __version__
from dynamo_core.frontend.fields import ChatBody, ClassifyBody, CompletionBody, EmbeddingBody, RerankBody, ScoreBody
from dynamo_core.frontend.replies import reply
from dynamo_core.frontend.service import Service

_GET = {
    "/v1/models": "The models that can be used now",
    "/v1/models/{id}": "One model; its id may contain slashes",
    "/health": "Status and details of the fleet",
    "/live": "The process runs",
    "/ready": "At least one model can be used",
    "/metrics": "Prometheus metrics",
    "/debug/decisions/{id}": "A routing decision, by decision or request id",
    "/debug/fleet": "Models, workers, planes",
}
_POST: dict[str, tuple[str, type[msgspec.Struct]]] = {
    "/v1/chat/completions": ("Chat completion, streamed or whole", ChatBody),
    "/v1/completions": ("Plain completion, streamed or whole", CompletionBody),
    "/v1/embeddings": ("One vector for each input", EmbeddingBody),
    "/v1/classify": ("One class for each input", ClassifyBody),
    "/v1/score": ("How well texts go together, pair by pair", ScoreBody),
    "/v1/rerank": ("Documents, the best for a query first", RerankBody),
}


@cache
def specification() -> dict[str, Any]:
    """OpenAPI 3.1."""
    schemas, components = msgspec.json.schema_components([body for _, body in _POST.values()], ref_template="#/components/schemas/{name}")
    error = {"description": "What went wrong", "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    paths: dict[str, Any] = {}
    for (path, (summary, _)), schema in zip(_POST.items(), schemas, strict=True):
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": {
                    "200": {"description": "The answer, or a stream of chunks", "content": {"application/json": {}, "text/event-stream": {}}},
                    "default": error,
                },
            }
        }
    for path, summary in _GET.items():
        parameters = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}] if "{id}" in path else []
        paths[path] = {"get": {"summary": summary, "parameters": parameters, "responses": {"200": {"description": summary}, "default": error}}}
    nullable = {"type": ["string", "null"]}
    fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": nullable, "code": nullable}
    components = {**components, "Error": {"type": "object", "properties": {"error": {"type": "object", "properties": fields, "required": list(fields)}}}}
    return {"openapi": "3.1.0", "info": {"title": "dynamo frontend", "version": __version__}, "paths": paths, "components": {"schemas": components}}


async def document(service: Service, request: Request) -> Response:
    return reply(specification())


async def page(service: Service, request: Request) -> Response:
    """A plain list of the endpoints; it loads nothing from elsewhere."""
    rows = "".join(
        f"<tr><td>{method.upper()}</td><td><code>{html.escape(path)}</code></td><td>{html.escape(about['summary'])}</td></tr>"
        for path, methods in specification()["paths"].items()
        for method, about in methods.items()
    )
    return HTMLResponse(
        "<!doctype html><meta charset=utf-8><title>dynamo frontend</title><style>body{font:16px sans-serif;margin:2em}td{padding:.3em 1em}</style>"
        f"<h1>dynamo frontend {__version__}</h1><table>{rows}</table><p>Request fields and their ranges: <a href='/openapi.json'>openapi.json</a></p>"
    )
