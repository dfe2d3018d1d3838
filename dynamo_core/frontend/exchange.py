"""One request as the HTTP surface sees it: what it asked for in headers, how far it got, how it ended."""

from __future__ import annotations

import os
import re
import time
from typing import Any

from dynamo_core.errors import RequestError
from dynamo_core.types import Usage

_HEADERS = {
    b"x-request-id": "request_id",
    b"traceparent": "traceparent",
    b"x-dynamo-session-id": "session",
    b"x-dynamo-priority": "priority",
    b"x-dynamo-instance": "instance",
    b"x-tenant-id": "tenant",
}
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/+=-]{0,127}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_SAFE_VALUE = re.compile(r"[\x21-\x7e][\x20-\x7e]{0,254}")


class Exchange:
    """State of one completion request. Times are `time.monotonic()` seconds."""

    __slots__ = (
        "account",
        "arrived",
        "body_read",
        "decisions",
        "endpoint",
        "error_code",
        "error_type",
        "finished",
        "first_token",
        "headers",
        "instance",
        "last_token",
        "left",
        "model",
        "priority",
        "request_id",
        "responding",
        "session",
        "status",
        "stream",
        "subject",
        "tenant",
        "tokens",
        "traceparent",
        "unique_id",
        "usage",
        "workers",
    )

    def __init__(self, endpoint: str, scope: Any) -> None:
        self.arrived = time.monotonic()
        self.endpoint = endpoint
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]
        found = {_HEADERS[name]: value for name, value in self.headers if name in _HEADERS}
        self.request_id = request_id(found.get("request_id"))
        self.unique_id = self.request_id
        """The id inside the fleet: the request id, made unique while another request of that id is in progress."""
        self.traceparent = text if (raw := found.get("traceparent")) and _TRACEPARENT.fullmatch(text := raw.decode("latin-1").strip().lower()) else None
        self.session: str | None = None
        self.tenant: str | None = None
        self.priority: int | None = None
        self.instance: int | None = None
        self.subject: str | None = None
        self.account: str | None = None
        """The tenant that an authenticator vouches for: who is limited and counted. A header alone is anybody's word."""
        self.body_read = False
        self.responding = False
        """The status line is out."""
        self.finished = False
        """The whole answer was handed to the HTTP server."""
        self.left = False
        """The client is gone: there is nobody to tell how it ended."""
        self.model = ""
        """Empty until the model is known to exist: metrics labels are bounded."""
        self.stream = False
        self.status = 499
        """What is true if nothing else becomes of it."""
        self.error_type = ""
        self.error_code = ""
        self.first_token = 0.0
        self.last_token = 0.0
        self.tokens = 0
        """Counted so far, for the time between tokens."""
        self.usage = Usage()
        self.decisions: list[str] = []
        self.workers: list[str] = []
        if found:
            self._take(found)

    def _take(self, found: dict[str, bytes]) -> None:
        self.session = _value(found.get("session"), "x-dynamo-session-id")
        self.tenant = _value(found.get("tenant"), "x-tenant-id")

    def check_numbers(self) -> None:
        """Headers that are numbers. :raises RequestError: they are not."""
        for name, value in self.headers:
            if name == b"x-dynamo-priority":
                self.priority = _integer(value, "x-dynamo-priority", -(2**31), 2**31)
            elif name == b"x-dynamo-instance":
                self.instance = _integer(value, "x-dynamo-instance", 0, 2**64)


def request_id(given: bytes | None) -> str:
    """The client's id when it is harmless in logs and headers, else a new one."""
    if given and _SAFE_ID.fullmatch(text := given.decode("latin-1")):
        return text
    return os.urandom(16).hex()


def _value(raw: bytes | None, name: str) -> str | None:
    if not raw:
        return None
    text = raw.decode("latin-1").strip()
    return text if _SAFE_VALUE.fullmatch(text) else None


def _integer(raw: bytes, name: str, low: int, high: int) -> int:
    try:
        value = int(raw[:32])
    except ValueError:
        raise RequestError(f"the header {name} must be an integer", param=name) from None
    if not low <= value < high:
        raise RequestError(f"the header {name} is out of range", param=name)
    return value
