"""Structured logs: one event a line, ids as fields, console on a terminal and JSON elsewhere. Nothing per token."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

import msgspec
import structlog

from dynamo_core.config.schema import Secret

_QUIET = ("hypercorn", "httpx", "httpcore", "asyncio", "uvicorn")


_CONTAINERS = (Secret, dict, list, tuple)


def _hide_secrets(record: logging.LogRecord) -> bool:
    """A secret is a string to whoever uses it; to the log it is where it came from."""
    for name, value in record.__dict__.items():
        if isinstance(value, _CONTAINERS):
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


class JsonLines(logging.Formatter):
    """One JSON object a line. There is a line for each request, and a chain of processors would be a tenth of what a short one costs."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = {"role": role} if role else {}
        self._second = (0, "")
        """The latest one, and how it is written."""

    def format(self, record: logging.LogRecord) -> str:
        if record.args:
            record.args = _masked(record.args)
        line: dict[str, Any] = {"event": record.getMessage(), "level": record.levelname.lower(), "logger": record.name}
        plain = True
        for name, value in record.__dict__.items():
            if name not in _STANDARD:
                if type(value) not in _PLAIN and not (type(value) is list and all(type(item) is str for item in value)):
                    value, plain = _masked(value), False
                line[name] = value
        line["timestamp"] = self._timestamp(record.created)
        line |= self._role
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        try:
            return _encode_plain(line).decode() if plain else _encode(line)
        except (TypeError, ValueError):  # JSON has no such keys, or no such characters
            return _encode({name: value if isinstance(value, str) else repr(value) for name, value in line.items()})

    def _timestamp(self, created: float) -> str:
        second = int(created)
        if second != self._second[0]:
            self._second = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._second[1]}.{int((created - second) * 1e6):06d}Z"


_encode = json.JSONEncoder(default=repr).encode
_encode_plain = msgspec.json.Encoder().encode
_PLAIN = frozenset((str, int, float, bool, type(None)))
_STANDARD = frozenset((*logging.makeLogRecord({}).__dict__, "message", "asctime"))
"""What every record has."""


def setup(level: str = "info", style: str = "auto", *, role: str = "") -> None:
    """Send every log line of the process to stderr. :param style: `console`, `json`, or `auto`."""
    console = style == "console" or (style == "auto" and sys.stderr.isatty())

    handler = logging.StreamHandler(sys.stderr)
    if console:
        handler.addFilter(_hide_secrets)
        handler.setFormatter(_console(role))
    else:
        handler.setFormatter(JsonLines(role))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    # What no line shows need not be found out for each of them.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = logging.logAsyncioTasks = False  # pyright: ignore[reportAttributeAccessIssue]
    logging._srcfile = None  # pyright: ignore[reportAttributeAccessIssue] (as logging's own documentation has it)


def _console(role: str) -> logging.Formatter:
    def name_role(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
        event["role"] = role
        return event

    shared: list[Any] = [
        structlog.stdlib.add_log_level, structlog.stdlib.add_logger_name, structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="%H:%M:%S.%f", utc=False),
    ]
    if role:
        shared.append(name_role)
    # The default formatter of tracebacks shows local variables: prompts and keys among them.
    renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
    return structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer])
