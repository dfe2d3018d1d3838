"""Bytes to a typed body, or a `RequestError` that tells the client what to change. Slow only when it fails."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from dynamo_core.errors import RequestError

T = TypeVar("T", bound=msgspec.Struct)

_PLACE = re.compile(r"^(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>[^`]*)`)?$", re.DOTALL)
_MAX_NESTING = 64


def decode(decoder: msgspec.json.Decoder[T], body: bytes | bytearray) -> T:
    """:raises RequestError: with `param`, and with every unknown field at once."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as e:
        raise _explain(decoder.type, body, e) from None
    except UnicodeDecodeError as e:
        raise RequestError(f"the body is not valid UTF-8: {e.reason}") from None
    except msgspec.DecodeError as e:
        raise RequestError(f"the body is not valid JSON: {_lower(str(e).removeprefix('JSON is malformed: '))}") from None
    except RecursionError:
        raise RequestError(f"the body is nested more deeply than {_MAX_NESTING} levels") from None


def check_nesting(value: Any, param: str) -> None:
    """Free-form JSON is walked again further on (templates, schemas, the wire), so its depth is bounded here."""
    level: list[Any] = [value]
    for _ in range(_MAX_NESTING):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise RequestError(f"{param} is nested more deeply than {_MAX_NESTING} levels", param=param)


def _explain(cls: Any, body: bytes | bytearray, error: msgspec.ValidationError) -> RequestError:
    try:
        raw = msgspec.json.decode(body)
    except RecursionError:
        return RequestError(f"the body is nested more deeply than {_MAX_NESTING} levels")
    except (msgspec.DecodeError, UnicodeDecodeError):
        raw = {}  # what follows the mistake that was found is broken, too; tell the first
    if not isinstance(raw, dict):
        return RequestError(f"the body must be a JSON object: {_lower(str(error))}")
    if unknown := list(_unknown(cls, raw, "")):
        listed = ", ".join(f"`{path}`" + (f" (did you mean `{close}`?)" if close else "") for path, close in unknown[:20])
        more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
        return RequestError(f"unknown field{'s' if len(unknown) > 1 else ''}: {listed}{more}", param=unknown[0][0])
    found = _PLACE.match(str(error))
    what, path = (found["what"], (found["path"] or "").lstrip(".")) if found else (str(error), "")
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", what):
        path = f"{path}.{missing[1]}".lstrip(".")
        return RequestError(f"the field `{path}` is required", param=path)
    if found and found["key"]:
        what = f"a key is wrong: {_lower(what)}"
    return RequestError(f"{path}: {_lower(what)}" if path else _lower(what), param=path or None)


def _unknown(cls: Any, value: Any, path: str) -> Iterator[tuple[str, str | None]]:
    """Path of every field that `cls` does not have, with the closest one that it has."""
    if not isinstance(value, dict):
        return
    hints = get_type_hints(cls, include_extras=True)
    for name, inner in value.items():
        if name not in hints:
            close = difflib.get_close_matches(name, hints, 1)
            yield f"{path}{name[:64]}", close[0] if close else None
        elif (struct := _struct_in(hints[name])) is not None:
            yield from _unknown(struct, inner, f"{path}{name}.")


def _struct_in(hint: Any) -> Any:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return hint
    if get_origin(hint) in (Union, types.UnionType, Annotated):
        return next(filter(None, map(_struct_in, get_args(hint))), None)
    return None


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
