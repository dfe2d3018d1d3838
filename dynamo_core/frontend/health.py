"""`/live`, `/ready` and `/health`: the process runs; it can serve; how well, and why not."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from dynamo_core.frontend.contract import TellsProblem
from dynamo_core.frontend.replies import reply
from dynamo_core.frontend.service import Service


async def live(service: Service, request: Request) -> Response:
    """200 while the process runs, also while it drains: restarting a draining process would cut its streams."""
    return reply({"status": "live"})


async def ready(service: Service, request: Request) -> Response:
    """200 when a load balancer may send requests here; else 503 with the reason."""
    if service.draining:
        return reply({"status": "draining", "message": "this frontend is shutting down"}, 503)
    if (missing := service.not_ready()) is not None:
        return reply({"status": "unready", "message": missing}, 503)
    return reply({"status": "ready"})


async def health(service: Service, request: Request) -> Response:
    """Details for people and dashboards. 503 when unready or draining; `degraded` (a problem is known, requests are served) is 200.

    The public address of a frontend that has another one for operators says only how well it is.
    """
    fleet = service.catalog.status()
    missing = service.not_ready()
    problems: dict[str, str] = dict(fleet.get("problems") or {})
    if missing is not None:
        problems["frontend"] = missing
    if isinstance(service.limiter, TellsProblem) and (problem := service.limiter.problem()) is not None:
        problems["rate_limiter"] = problem
    if service.draining:
        status = "draining"
    elif missing is not None:
        status = "unready"
    else:
        status = "degraded" if problems else "healthy"
    if service.config.admin is not None and not request.scope.get("admin"):
        fleet, problems = {}, dict.fromkeys(problems, "see the operators' address")
    content = {**fleet, "status": status, "problems": problems, "requests_in_progress": len(service.in_progress)}
    return reply(content, 503 if status in ("draining", "unready") else 200)
