"""The HTTP servers that every test of the wire goes through."""

from __future__ import annotations

from dynamo_core.frontend.servers.hypercorn import HypercornServer
from dynamo_core.frontend.servers.uvicorn import UvicornServer

SERVERS = {"hypercorn": HypercornServer, "uvicorn": UvicornServer}
