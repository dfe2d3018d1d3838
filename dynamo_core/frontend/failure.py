"""Errors as clients see them: OpenAI's shape, the right status, and nothing that belongs in the log."""

from __future__ import annotations

import math
from typing import Any

import attrs
import msgspec

from dynamo_core.errors import Cancelled, DynamoError, EndpointNotFound, QuotaExceeded, RateLimited, RequestError, StoreUnavailable, StreamError, Unavailable

Header = tuple[bytes, bytes]


@attrs.frozen
class Failure:
    status: int
    message: str
    kind: str
    """OpenAI's `type`."""
    code: str
    param: str | None = None
    retry_after: float | None = None
    """Seconds."""
    unexpected: bool = False
    """Nobody raised this on purpose: the log gets the traceback, the client does not."""

    @classmethod
    def of(cls, error: BaseException, request_id: str) -> Failure:
        if isinstance(error, RequestError):
            retry = error.retry_after if isinstance(error, RateLimited) and not isinstance(error, QuotaExceeded) else None
            return cls(error.status, str(error), error.kind, error.code, error.param, retry)
        if isinstance(error, Unavailable):
            return cls(error.status, str(error), error.kind, error.code, retry_after=error.retry_after)
        if isinstance(error, StoreUnavailable):
            return cls(503, str(error), "service_unavailable", error.code, retry_after=1.0)
        if isinstance(error, Cancelled):
            return cls(error.status, str(error), "cancelled", error.code)
        if isinstance(error, StreamError):
            # A missing endpoint is the fleet's affair; 404 would tell the client that its model or URL is wrong.
            status = 503 if isinstance(error, EndpointNotFound) else error.status
            kind = {503: "service_unavailable", 504: "timeout_error", 529: "overloaded_error"}.get(status, "server_error")
            return cls(status, str(error), kind, error.code, retry_after=1.0 if status in (503, 529) else None)
        code = error.code if isinstance(error, DynamoError) else "internal"
        return cls(500, f"internal error; the server's log has the details under request id {request_id}", "server_error", code, unexpected=True)

    @property
    def body(self) -> bytes:
        error: dict[str, Any] = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    @property
    def headers(self) -> list[Header]:
        if self.status == 401:
            return [(b"www-authenticate", b"Bearer")]
        if self.code == QuotaExceeded.code:
            return [(b"x-should-retry", b"false")]  # client libraries ask again after any other 429
        if self.retry_after is None:
            return []
        return [(b"retry-after", b"%d" % max(1, math.ceil(self.retry_after)))]

    @property
    def error_type(self) -> str:
        """The metrics label, bounded."""
        if self.status == 499:
            return "cancelled"
        if self.status in (429, 529):
            return "overload"
        return {404: "not_found", 503: "unavailable", 504: "response_timeout"}.get(self.status, "validation" if self.status < 500 else "internal")
