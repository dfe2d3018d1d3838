"""What all endpoints of one application share: configuration, catalog, who is in progress, and the end of every request."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Protocol

import attrs

from dynamo_core.config.schema import Frontend
from dynamo_core.frontend.contract import Authenticator, Principal, RateLimiter
from dynamo_core.frontend.exchange import Exchange
from dynamo_core.frontend.metrics import HttpMetrics
from dynamo_core.pipeline.contract import Catalog, Holding

access = logging.getLogger("dynamo.access")
log = logging.getLogger("dynamo.frontend")


class FinishedObserver(Protocol):
    """Called once per completion request, after its last byte was handed over. The shape of the hook `dynamo_request_finished`."""

    def __call__(self, *, request_id: str, model: str, status: int, usage: dict[str, int], seconds: float) -> object: ...


@attrs.define(eq=False)
class Service:
    config: Frontend
    catalog: Catalog
    metrics: HttpMetrics
    observers: Sequence[FinishedObserver] = ()
    authenticator: Authenticator | None = None
    limiter: RateLimiter | None = None
    holding: Holding | None = None
    """Where requests wait for models without workers; without one they are turned away."""
    draining: bool = False
    in_progress: set[str] = attrs.field(factory=lambda: set[str]())
    """Unique ids of the requests in progress."""

    def not_ready(self) -> str | None:
        """Why requests cannot be taken, in a sentence. One that may wait for its worker can be taken."""
        missing = self.catalog.not_ready()
        return None if missing is not None and self.holding is not None and self.holding.cold() else missing

    async def authenticate(self, headers: list[tuple[bytes, bytes]]) -> Principal | None:
        """:raises Unauthorized: by the authenticator, if there is one."""
        if self.authenticator is None:
            return None
        return await self.authenticator.authenticate({name.decode("latin-1"): value.decode("latin-1") for name, value in headers})

    def admit(self, exchange: Exchange) -> None:
        """Give the request an id that no other request in progress has: engines and decision rings tell requests apart by it."""
        while exchange.unique_id in self.in_progress:
            exchange.unique_id = f"{exchange.request_id}-{os.urandom(4).hex()}"
        self.in_progress.add(exchange.unique_id)

    def finish(self, exchange: Exchange) -> None:
        """Count, log and announce; nothing here can fail the request, which is over."""
        self.in_progress.discard(exchange.unique_id)
        seconds = time.monotonic() - exchange.arrived
        self.metrics.end(exchange, seconds)
        usage = exchange.usage
        if access.isEnabledFor(logging.INFO):
            access.info(
                "request finished",
                extra={
                    "request_id": exchange.request_id,
                    "endpoint": exchange.endpoint,
                    "model": exchange.model,
                    "stream": exchange.stream,
                    "status": exchange.status,
                    "error": exchange.error_code,
                    "seconds": round(seconds, 6),
                    "ttft_seconds": round(exchange.first_token - exchange.arrived, 6) if exchange.first_token else None,
                    "prompt_tokens": usage.prompt_tokens,
                    "completion_tokens": usage.completion_tokens,
                    "cached_tokens": usage.cached_tokens,
                    "decisions": exchange.decisions,
                    "workers": exchange.workers,
                    "tenant": exchange.tenant,
                    "subject": exchange.subject,
                },
            )
        for observer in self.observers:
            try:
                observer(
                    request_id=exchange.request_id,
                    model=exchange.model,
                    status=exchange.status,
                    seconds=seconds,
                    usage={"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens, "cached_tokens": usage.cached_tokens},
                )
            except Exception:
                log.exception("an observer of finished requests failed", extra={"request_id": exchange.request_id})
