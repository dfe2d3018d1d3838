"""Structured logs: one event a line, ids as fields, console on a terminal and JSON elsewhere. Nothing per token."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from dynamo_core.config.schema import Secret

_QUIET = ("hypercorn", "httpx", "httpcore", "asyncio", "_granian")


def _hide_secrets(record: logging.LogRecord) -> bool:
    """A secret is a string to whoever uses it; to the log it is where it came from."""
    for name, value in record.__dict__.items():
        if isinstance(value, Secret | dict | list | tuple):
            record.__dict__[name] = _masked(value)
    return True


def _masked(value: Any) -> Any:
    match value:
        case Secret():
            return repr(value)
        case dict():
            return {key: _masked(inner) for key, inner in value.items()}
        case list() | tuple():
            return type(value)(map(_masked, value)) if type(value) in (list, tuple) else value
        case _:
            return value


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
    handler.addFilter(_hide_secrets)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=final))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
