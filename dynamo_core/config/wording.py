"""How problems speak: what was wanted, what was found, what was probably meant."""

from __future__ import annotations

import collections.abc
import difflib
import typing
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import attrs

from dynamo_core.config.schema import Use
from dynamo_core.config.tree import Key, dotted

SPOKEN: Mapping[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", Path: "a path (a string)"}


def refusal(e: Exception, a: attrs.Attribute[Any], at: Key, value: Any) -> tuple[str, str]:
    """What a validator said, in our words: `(what, remedy)`."""
    message = str(e.args[0]) if e.args else type(e).__name__
    message = message.removeprefix(f"'{a.name}' ").removeprefix(f"{a.name} ")
    if len(e.args) == 4 and isinstance(e.args[2], Iterable) and not isinstance(e.args[2], str):
        choices = [str(choice) for choice in e.args[2]]
        close = close_to(str(value), choices)
        return f"{dotted(at)} must be one of {', '.join(map(repr, choices))}, {is_now(value)}", f"did you mean {close!r}?" if close else ""
    return f"{dotted(at)} {message}" if message.startswith("must") else f"{dotted(at)}: {message}", ""


def close_to(word: str, known: Iterable[str]) -> str | None:
    known = list(known)
    folded = word.lower().replace("-", "_")
    if folded in known:
        return folded
    return next(iter(difflib.get_close_matches(folded, known, 1, 0.6)), None)


def spoken(wanted: Any) -> str:
    if wanted in SPOKEN:
        return SPOKEN[wanted]
    if wanted is Use:
        return "the name of a component"
    if wanted is timedelta:
        return "a duration"
    if isinstance(wanted, type) and attrs.has(wanted):
        return "a table"
    origin = typing.get_origin(wanted)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(wanted)))
    if origin in (dict, collections.abc.Mapping):
        return "a table"
    return "an array" if origin is not None else str(getattr(wanted, "__name__", wanted))


def is_now(raw: Any) -> str:
    """`is the string "8000"`."""
    if isinstance(raw, bool):
        return f"is {str(raw).lower()}"
    if isinstance(raw, str):
        return f'is the string "{raw if len(raw) <= 60 else raw[:57] + "..."}"'
    if isinstance(raw, Mapping):
        return "is a table"
    if isinstance(raw, list | tuple):
        return "is an array"
    return "is empty" if raw is None else f"is {raw}"


def remedy_for(wanted: Any, raw: Any) -> str:
    if wanted in (bool, int, float) and isinstance(raw, str):
        if wanted is bool and raw.lower() in ("true", "false", "yes", "no", "on", "off"):
            return f"write {'true' if raw.lower() in ('true', 'yes', 'on') else 'false'}, without quotes"
        try:
            wanted(raw)
        except ValueError:
            return ""
        return f"write {raw}, without quotes" if wanted is not bool else ""
    if wanted in (str, Path) and isinstance(raw, int | float):
        return f'write "{str(raw).lower() if isinstance(raw, bool) else raw}", in quotes'
    return ""
