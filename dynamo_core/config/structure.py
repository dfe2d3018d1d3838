"""Plain data to attrs classes, strictly: no unknown keys, no coercion, and every problem at once."""

from __future__ import annotations

import collections.abc
import difflib
import enum
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn, Union

import attrs

from dynamo_core.config.schema import Secret, Use
from dynamo_core.config.tree import NOWHERE, Key, Origin, dotted, nearest, variable
from dynamo_core.errors import ConfigError, PluginError, Problem
from dynamo_core.plugins import Plugins

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SPOKEN: Mapping[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", Path: "a path (a string)"}


class Bad(Exception):
    """The value cannot be used; why is in `Structurer.problems`."""


class Structurer:
    """One pass over data. `problems` collects what is wrong; `secrets` what must not be shown."""

    def __init__(self, marks: Mapping[Key, Origin], plugins: Plugins | None = None, environ: Mapping[str, str] = os.environ) -> None:
        self.marks = marks
        self.plugins = plugins
        self.environ = environ
        self.problems: list[Problem] = []
        self._literals: set[str] = set()

    def finish(self) -> None:
        """:raises ConfigError: with every problem so far, if there is one."""
        if self.problems:
            raise ConfigError(*map(self._masked, self.problems))

    def bad(self, at: Key, what: str, remedy: str = "", *, origin: Origin | None = None) -> NoReturn:
        self.problems.append((origin or nearest(self.marks, at)).problem(what, remedy))
        raise Bad

    # -------------------------------------------------------------- tables

    def table(self, cls: type[Any], raw: Any, at: Key, name: str = "") -> Any:
        """An instance of the attrs class `cls`. `name` is how problems call the table."""
        name = name or (f"[{dotted(at)}]" if at else "the configuration")
        if not isinstance(raw, Mapping):
            self.bad(at, f"{dotted(at)} must be a table, {_is(raw)}")
        fields = {a.alias: a for a in attrs.fields(cls) if a.init}
        before = len(self.problems)
        for key in raw:
            if key not in fields:
                self._unknown(name, key, list(fields), at)
        hints = _hints(cls)
        values: dict[str, Any] = {}
        for key, a in fields.items():
            place = (*at, key)
            if key in raw:
                try:
                    values[key] = self._field(cls, a, hints, raw[key], place)
                except Bad:
                    pass
            elif a.default is attrs.NOTHING:
                self.problems.append(nearest(self.marks, at).problem(f"{name} needs {key!r}"))
        self._validate(cls, fields, values, at)
        if len(self.problems) > before:
            raise Bad
        try:
            return cls(**values)
        except (ValueError, TypeError) as e:
            self.bad(at, f"{name}: {e}")

    def _field(self, cls: type[Any], a: attrs.Attribute[Any], hints: Mapping[str, Any], raw: Any, at: Key) -> Any:
        if a.converter is not None:
            return raw
        if a.name not in hints:
            self.bad(at, f"the type of {cls.__name__}.{a.name}, {a.type!r}, cannot be resolved", "annotate options with types that exist at run time")
        return self.value(hints[a.name], raw, at, a.metadata, default=_default_use(a))

    def _validate(self, cls: type[Any], fields: Mapping[str, attrs.Attribute[Any]], values: Mapping[str, Any], at: Key) -> None:
        """Run each validator by itself, on a stand-in that holds what is known to be good, so that one failure does not hide the next."""
        stand_in = object.__new__(cls)
        for key, value in values.items():
            object.__setattr__(stand_in, fields[key].name, value)
        for key, value in values.items():
            a = fields[key]
            if a.validator is None or a.converter is not None:
                continue
            try:
                a.validator(stand_in, a, value)
            except (ValueError, TypeError) as e:
                self.problems.append(nearest(self.marks, (*at, key)).problem(*_refusal(e, a, (*at, key), value)))
            except AttributeError:
                continue  # it looked at a field that is itself wrong, or at one that has its default

    def _unknown(self, name: str, key: Any, known: Sequence[str], at: Key) -> None:
        place = (*at, key)
        origin = nearest(self.marks, place)
        close = _close(str(key), known)
        if origin.kind == "env":
            what = f"{variable(place)} matches no setting"
            remedy = f"did you mean {variable((*at, close))}?" if close else f"{name} has: {', '.join(known) or 'no keys'}"
        else:
            what = f"{name} has no key {key!r}"
            remedy = f"did you mean {close!r}?" if close else f"it has: {', '.join(known)}" if known else "it takes no options"
        self.problems.append(origin.problem(what, remedy))

    # -------------------------------------------------------------- values

    def value(self, wanted: Any, raw: Any, at: Key, metadata: Mapping[str, Any] = {}, *, default: Use | None = None) -> Any:
        """`raw` as the type `wanted`, or `Bad`."""
        origin, args = typing.get_origin(wanted), typing.get_args(wanted)
        if wanted is Secret:
            return self.secret(raw, at)
        if wanted is Use:
            return self.use(raw, at, metadata, default)
        if wanted is Any or wanted is object:
            return raw
        if isinstance(wanted, typing.NewType):
            return self.value(wanted.__supertype__, raw, at, metadata)
        if origin is typing.Annotated:
            return self.value(args[0], raw, at, metadata, default=default)
        if origin is Literal:
            return self._one_of(args, raw, at)
        if origin in (Union, types.UnionType):
            return self._union(args, raw, at, metadata, default)
        if origin in (tuple, list, set, frozenset, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Set):
            return self._sequence(origin, args, raw, at, metadata)
        if origin in (dict, collections.abc.Mapping):
            return self._mapping(args[1], raw, at, metadata)
        if isinstance(wanted, type) and attrs.has(wanted):
            return self.table(wanted, raw, at)
        return self._scalar(wanted, raw, at, metadata)

    def _scalar(self, wanted: Any, raw: Any, at: Key, metadata: Mapping[str, Any]) -> Any:
        origin = nearest(self.marks, at)
        if wanted in (str, Path) and origin.text is not None and not isinstance(raw, Mapping | list):
            raw = origin.text
        number = isinstance(raw, int | float) and not isinstance(raw, bool)
        if wanted is float and number:
            return float(raw)
        if (wanted is timedelta or (wanted is float and metadata.get("duration"))) and (number or isinstance(raw, str)):
            seconds = self._seconds(raw, at)
            return timedelta(seconds=seconds) if wanted is timedelta else seconds
        if wanted is int and number and isinstance(raw, int):
            return raw
        if wanted is Path and isinstance(raw, str):
            return Path(raw).expanduser()
        if wanted in (str, bool) and isinstance(raw, wanted):
            return raw
        if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
            return wanted(self._one_of([member.value for member in wanted], raw, at))
        if wanted in (type(None), None) and raw is None:
            return None
        if wanted not in _SPOKEN and isinstance(wanted, type) and isinstance(raw, wanted):
            return raw
        self.bad(at, f"{dotted(at)} must be {_spoken(wanted)}, {_is(raw)}", _remedy(wanted, raw))

    def _seconds(self, raw: Any, at: Key) -> float:
        if not isinstance(raw, str):
            return float(raw)
        if (found := _DURATION.fullmatch(raw.strip())) is None:
            self.bad(at, f"{dotted(at)} must be a number of seconds, {_is(raw)}", 'write 0.5, "500ms", "30s", "10m" or "1h"')
        return float(found[1]) * _SECONDS[found[2]]

    def _one_of(self, choices: Sequence[Any], raw: Any, at: Key) -> Any:
        for choice in choices:
            if type(choice) is type(raw) and choice == raw:
                return raw
        close = _close(str(raw), [str(choice) for choice in choices])
        spoken = ", ".join(map(repr, choices))
        self.bad(at, f"{dotted(at)} must be one of {spoken}, {_is(raw)}", f"did you mean {close!r}?" if close else "")

    def _union(self, args: Sequence[Any], raw: Any, at: Key, metadata: Mapping[str, Any], default: Use | None) -> Any:
        rest = [arg for arg in args if arg is not type(None)]
        if raw is None and len(rest) < len(args):
            return None
        if len(rest) == 1:
            return self.value(rest[0], raw, at, metadata, default=default)
        for arg in rest:
            attempt = Structurer(self.marks, self.plugins, self.environ)
            try:
                return attempt.value(arg, raw, at, metadata, default=default)
            except Bad:
                self._literals |= attempt._literals
        self.bad(at, f"{dotted(at)} must be {' or '.join(map(_spoken, rest))}, {_is(raw)}")

    def _sequence(self, origin: Any, args: Sequence[Any], raw: Any, at: Key, metadata: Mapping[str, Any]) -> Any:
        if not isinstance(raw, list | tuple):
            what = "an array of tables" if args and isinstance(args[0], type) and attrs.has(args[0]) and args[0] is not Use else "an array"
            self.bad(at, f"{dotted(at)} must be {what}, {_is(raw)}", f"write it as [[{dotted(at)}]]" if isinstance(raw, Mapping) and what != "an array" else "put it in [ ]")
        items: Sequence[Any] = raw
        fixed = origin is tuple and not (len(args) == 2 and args[1] is Ellipsis)
        if fixed and len(items) != len(args):
            self.bad(at, f"{dotted(at)} must have {len(args)} elements, it has {len(items)}")
        values: list[Any] = []
        for i, item in enumerate(items):
            try:
                values.append(self.value(args[i] if fixed else args[0] if args else Any, item, (*at, i), metadata))
            except Bad:
                pass
        if len(values) < len(items):
            raise Bad
        return origin(values) if origin in (list, set, frozenset) else frozenset(values) if origin is collections.abc.Set else tuple(values)

    def _mapping(self, wanted: Any, raw: Any, at: Key, metadata: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(raw, Mapping):
            self.bad(at, f"{dotted(at)} must be a table, {_is(raw)}")
        values: dict[str, Any] = {}
        for key, item in raw.items():
            try:
                values[key] = self.value(wanted, item, (*at, key), metadata)
            except Bad:
                pass
        if len(values) < len(raw):
            raise Bad
        return values

    # -------------------------------------------------------------- components

    def use(self, raw: Any, at: Key, metadata: Mapping[str, Any], default: Use | None = None) -> Use:
        kind = str(metadata.get("kind", ""))
        origin = nearest(self.marks, at)
        if isinstance(raw, Use):
            return raw
        if isinstance(raw, str):
            raw = {"use": raw}
        if not isinstance(raw, Mapping):
            self.bad(at, f"{dotted(at)} must name a {kind.replace('_', ' ')}, {_is(raw)}", f'write {at[-1]} = "NAME" or {at[-1]} = {{ use = "NAME", ... }}')
        options = dict(raw)
        name = options.pop("use", None if default is None else default.name)
        if name is None:
            close = _close("use", [str(key) for key in options])
            self.bad(at, f"{dotted(at)} does not say which {kind.replace('_', ' ')} to use", f"did you mean `use` instead of {close!r}?" if close else 'add use = "NAME"')
        if not isinstance(name, str) or not name:
            self.bad((*at, "use"), f"{dotted((*at, 'use'))} must be the name of a {kind.replace('_', ' ')}, {_is(name)}")
        weight = 1.0
        before = len(self.problems)
        if "weight" in metadata.get("reserved", ()) and "weight" in options:
            try:
                weight = self.value(float, options.pop("weight"), (*at, "weight"))
                if not math.isfinite(weight):
                    self.bad((*at, "weight"), f"{dotted((*at, 'weight'))} must be finite: {weight}")
            except Bad:
                pass
        marks = {key[len(at) :]: mark for key, mark in self.marks.items() if key[: len(at)] == at}
        marks.setdefault((), origin)
        chosen = Use(name, options, origin.where, weight, marks)
        if self.plugins is not None and kind:
            try:
                self.component(chosen, kind, at, self.plugins)
            except Bad:
                pass
        if len(self.problems) > before:
            raise Bad
        return chosen

    def component(self, use: Use, kind: str, at: Key, plugins: Plugins) -> Any:
        """Import the component and build it with its options."""
        named = nearest(self.marks, (*at, "use"))
        try:
            found = plugins.find(kind, use.name, where=named.where, source=named.source)
            implementation = found.load()
        except ConfigError as e:
            self.problems.extend(e.problems)
            raise Bad from None
        except PluginError as e:
            self.bad(at, str(e), origin=named)
        spoken = f"{kind.replace('_', ' ')} {use.name!r}"
        if isinstance(implementation, type) and attrs.has(implementation):
            return self.table(implementation, use.options, at, spoken)
        for key in use.options:
            self._unknown(spoken, key, (), at)
        if use.options:
            raise Bad
        return implementation

    def secret(self, raw: Any, at: Key) -> Secret:
        scheme, _, rest = raw.partition(":") if isinstance(raw, str) else ("", "", "")
        if scheme == "env" and rest:
            if (found := self.environ.get(rest)) is None:
                self.bad(at, f"{dotted(at)}: the environment variable {rest} is not set")
            return Secret(found, str(raw))
        if scheme == "file" and rest:
            try:
                return Secret(Path(rest).expanduser().read_text("utf-8").strip(), str(raw))
            except (OSError, ValueError) as e:
                reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
                self.bad(at, f"{dotted(at)}: the file {rest} cannot be read: {reason}")
        if isinstance(raw, str) and raw:
            self._literals.add(raw)
        self.bad(at, f"{dotted(at)} is a secret and must not stand in the configuration itself", 'write "file:/path/to/it" or "env:NAME"')

    def _masked(self, problem: Problem) -> Problem:
        for literal in sorted(self._literals, key=len, reverse=True):
            mask = [text.replace(literal, "***") for text in (problem.what, problem.where, problem.source, problem.remedy)]
            problem = Problem(*mask)
        return problem


def _default_use(a: attrs.Attribute[Any]) -> Use | None:
    default: Any = a.default
    if isinstance(default, attrs.Factory) and "kind" in a.metadata and not default.takes_self:  # pyright: ignore[reportArgumentType]
        default = default.factory()
    return default if isinstance(default, Use) else None


def _hints(cls: type[Any]) -> dict[str, Any]:
    """Types of the fields; one that does not resolve is left out, so that it harms only those who set it."""
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except Exception:
        hints: dict[str, Any] = {}
        for a in attrs.fields(cls):
            owner = next((c for c in cls.__mro__ if a.name in c.__dict__.get("__annotations__", {})), cls)
            space = vars(__import__(owner.__module__, fromlist=["_"]))
            try:
                hints[a.name] = eval(a.type, dict(space)) if isinstance(a.type, str) else a.type
            except Exception:
                continue
        return hints


def _refusal(e: Exception, a: attrs.Attribute[Any], at: Key, value: Any) -> tuple[str, str]:
    """What a validator said, in our words: `(what, remedy)`."""
    message = str(e.args[0]) if e.args else type(e).__name__
    message = message.removeprefix(f"'{a.name}' ").removeprefix(f"{a.name} ")
    if len(e.args) == 4 and isinstance(e.args[2], Iterable) and not isinstance(e.args[2], str):
        choices = [str(choice) for choice in e.args[2]]
        close = _close(str(value), choices)
        return f"{dotted(at)} must be one of {', '.join(map(repr, choices))}, {_is(value)}", f"did you mean {close!r}?" if close else ""
    return f"{dotted(at)} {message}" if message.startswith("must") else f"{dotted(at)}: {message}", ""


def _close(word: str, known: Iterable[str]) -> str | None:
    known = list(known)
    folded = word.lower().replace("-", "_")
    if folded in known:
        return folded
    return next(iter(difflib.get_close_matches(folded, known, 1, 0.6)), None)


def _spoken(wanted: Any) -> str:
    if wanted in _SPOKEN:
        return _SPOKEN[wanted]
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


def _is(raw: Any) -> str:
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


def _remedy(wanted: Any, raw: Any) -> str:
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
