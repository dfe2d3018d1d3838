"""What stands above the file: environment variables, then `--set`. Each writes into the tree and leaves its mark."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dynamo_core.config.tree import Key, Origin, Tree, dotted
from dynamo_core.errors import Problem

PREFIX = "DYNAMO__"

VARIABLES: Mapping[str, str] = {
    "DYNAMO_CONFIG": "the configuration file, where a command names none",
    "DYNAMO_DISABLED_PLUGINS": "plugins to leave out, by entry point or distribution, separated by commas",
}
"""Environment variables that are not settings. A setting is `DYNAMO__` and its path, joined by double underscores."""


def apply_environment(tree: Tree, environ: Mapping[str, str]) -> Iterator[Problem]:
    for name in sorted(environ):
        if name.startswith(PREFIX):
            origin = Origin("env", f"environment variable {name}", f"{name}={environ[name]}", environ[name])
            parts = name.removeprefix(PREFIX).split("__")
            if not all(parts):
                yield origin.problem(f"{name} matches no setting", "write DYNAMO__TABLE__KEY, with double underscores between the levels")
            else:
                yield from _write(tree, [part.lower() for part in parts], environ[name], origin)
        elif name.startswith("DYNAMO_") and name not in VARIABLES:
            yield from _stray(name)


def _stray(name: str) -> Iterator[Problem]:
    """Others may own variables that begin with DYNAMO_ (every service in Kubernetes does); only what is clearly meant for us is a mistake."""
    where = f"environment variable {name}"
    if "__" in name:
        yield Problem(f"{name} matches no setting", where, remedy=f"did you mean DYNAMO__{name.removeprefix('DYNAMO_')}?")
    elif close := difflib.get_close_matches(name, VARIABLES, 1, 0.9):
        yield Problem(f"{name} means nothing", where, remedy=f"did you mean {close[0]}?")


def apply_overrides(tree: Tree, overrides: Sequence[str]) -> Iterator[Problem]:
    for override in overrides:
        key, equals, text = override.partition("=")
        key, text = key.strip(), text.strip()
        origin = Origin("set", f"--set {key}", override, text)
        parts = key.replace("[", ".").replace("]", "").split(".")
        if not equals or not all(parts):
            yield origin.problem(f"--set {override!r} is not of the form KEY=VALUE", "for example --set router.temperature=0.2 or --set workers.0.count=4")
        else:
            yield from _write(tree, parts, text, origin)


def _write(tree: Tree, parts: Sequence[str], text: str, origin: Origin) -> Iterator[Problem]:
    try:
        value = parse_value(text)
    except ValueError as e:
        yield origin.problem(f"the value {text!r} cannot be read: {e}")
        return
    place: Any = tree.data
    at: Key = ()
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        step: str | int = part
        if isinstance(place, list) or (isinstance(place, dict) and part.isdigit() and not place and at):
            if not part.isdigit():
                yield origin.problem(f"{dotted(at)} is a list, and {part!r} is not a position in it", f"write {dotted(at)}.0.{part} for the first element")
                return
            step = int(part)
            if not isinstance(place, list):
                place = _replace(tree, at, [])
            if step > len(place):
                yield origin.problem(f"{dotted(at)} has {len(place)} elements, so there is none at {step}", f"the next is {dotted(at)}.{len(place)}")
                return
        if last:
            _put(place, step, value)
            at = (*at, step)
            for below in [mark for mark in tree.marks if mark[: len(at)] == at]:
                del tree.marks[below]
            tree.marks[at] = origin
            return
        at = (*at, step)
        inner = _get(place, step)
        if isinstance(inner, str):  # `discovery = "file"` is short for a table, and this adds an option to it
            inner = {"use": inner}
            tree.marks[(*at, "use")] = tree.origin(at)
            _put(place, step, inner)
        elif not isinstance(inner, dict | list):
            inner = {}
            tree.marks.setdefault(at, origin)
            _put(place, step, inner)
        place = inner


def _get(place: Any, step: str | int) -> Any:
    try:
        return place[step]
    except (KeyError, IndexError):
        return None


def _put(place: Any, step: str | int, value: Any) -> None:
    if step == len(place):
        place.append(value)
    else:
        place[step] = value


def _replace(tree: Tree, at: Key, value: Any) -> Any:
    place: Any = tree.data
    for step in at[:-1]:
        place = place[step]
    place[at[-1]] = value
    return value


def parse_value(text: str) -> Any:
    """A TOML value; what is not one is a string. :raises ValueError: it opens a quote, an array or a table and does not close it."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        if text[:1] in ("[", "{", '"', "'"):
            raise ValueError(f"it is not a TOML value ({str(e).partition(' (at')[0]})") from None
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text
