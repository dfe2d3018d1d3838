"""JSON replies of the small endpoints."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response


def reply(content: Any, status: int = 200) -> Response:
    """Encoded by msgspec; what it does not know (paths, classes) is written as text."""
    return Response(msgspec.json.encode(content, enc_hook=str), status, media_type="application/json")
