"""Structured logs: one event a line, ids as fields, console on a terminal and JSON elsewhere. Nothing per token."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

_QUIET = ("hypercorn", "httpx", "httpcore", "asyncio", "_granian")


def setup(level: str = "info", style: str = "auto", *, role: str = "") -> None:
    """Send every log line of the process to stderr. :param style: `console`, `json`, or `auto`."""
    console = style == "console" or (style == "auto" and sys.stderr.isatty())

    def name_role(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
        event["role"] = role
        return event

    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="%H:%M:%S.%f" if console else "iso", utc=not console),
    ]
    if role:
        shared.append(name_role)
    final: list[Any] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if console:
        # The default formatter of tracebacks shows local variables: prompts and keys among them.
        final.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback))
    else:
        final += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=final))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
