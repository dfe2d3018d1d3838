"""What plugins add to the HTTP surface: routes of their own, and middleware around everything (kinds `routes` and `middleware`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from dynamo_core.pipeline.contract import Catalog


@runtime_checkable
class Routes(Protocol):
    """`frontend.routes = [{ use = "mine" }]`. The options are the fields of the attrs class."""

    def routes(self, catalog: Catalog) -> Sequence[BaseRoute]:
        """Starlette routes, tried after the built-in ones. Called once, at start. Errors raised as `DynamoError` are answered in OpenAI's shape."""
        ...


@runtime_checkable
class AsgiMiddleware(Protocol):
    """`frontend.middleware = [{ use = "mine" }]`, the first one outermost."""

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """An ASGI application around `app`. Called once, at start; what it returns sees every request, health probes included."""
        ...
