"""From a guided request to what llama.cpp constrains its sampler with."""

from __future__ import annotations

from typing import Any

from dynamo_core.errors import RequestError
from dynamo_core.types import Guided

_COMPACT: dict[str, Any] = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
"""Small models would rather write line breaks for ever than the next key."""


def constraint(guided: Guided) -> dict[str, Any]:
    """Fields of a completion body. :raises RequestError: nothing to constrain with."""
    if guided.json_schema is not None:
        return {"json_schema": _COMPACT | guided.json_schema}
    if guided.json_object:
        return {"json_schema": _COMPACT | {"type": "object"}}
    if guided.choice is not None:
        if not guided.choice:
            raise RequestError("a choice needs at least one option", param="guided.choice")
        return {"grammar": "root ::= " + " | ".join(_quoted(option) for option in guided.choice)}
    if guided.regex is not None:
        return {"grammar": f"%llguidance {{}}\nstart: /{_in_slashes(guided.regex)}/"}
    if guided.grammar is not None:
        return {"grammar": guided.grammar}
    raise RequestError("a guided request needs json_schema, json_object, regex, grammar or choice", param="guided")


def _quoted(text: str) -> str:
    """A GBNF literal."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(char) or (char if char >= " " else f"\\x{ord(char):02X}") for char in text) + '"'


def _in_slashes(pattern: str) -> str:
    """The pattern as a Lark terminal: an unescaped slash or a line break would end it."""
    out: list[str] = []
    escaped = False
    for char in pattern:
        if char == "\n":
            out.append("n" if escaped else "\\n")
        elif char == "/" and not escaped:
            out.append("\\/")
        else:
            out.append(char)
        escaped = char == "\\" and not escaped
    return "".join(out)
