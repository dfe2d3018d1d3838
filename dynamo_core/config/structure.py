"""Plain data to attrs classes, strictly: no unknown keys, no coercion, and every problem at once."""

from __future__ import annotations

import collections.abc
import contextlib
import enum
import inspect
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Union

import attrs

from dynamo_core.config.rules import conflicts
from dynamo_core.config.schema import Secret, Use
from dynamo_core.config.tree import Key, Origin, dotted, nearest, variable
from dynamo_core.config.wording import SPOKEN, close_to, is_now, refusal, remedy_for, spoken
from dynamo_core.errors import ConfigError, PluginError, Problem
from dynamo_core.plugins import Plugins

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Bad(Exception):
    """The value cannot be used; why is in `Structurer.problems`."""


class Structurer:
    """One pass over data. `problems` collects what is wrong; `secrets` what must not be shown."""

    def __init__(self, marks: Mapping[Key, Origin], plugins: Plugins | None = None, environ: Mapping[str, str] = os.environ,
                 foreign: Callable[[Key], bool] = lambda at: False) -> None:
        self.marks = marks
        self.plugins = plugins
        self.environ = environ
        self.foreign = foreign
        """Which places are for processes of another role, whose plugins and secrets this machine need not have."""
        self.problems: list[Problem] = []
        self._literals: set[str] = set()

    def finish(self) -> None:
        """:raises ConfigError: with every problem so far, if there is one."""
        if self.problems:
            raise ConfigError(*map(self._masked, sorted(dict.fromkeys(self.problems), key=_reading_order)))

    def bad(self, at: Key, what: str, remedy: str = "", *, origin: Origin | None = None) -> Bad:
        """Write the problem down; the caller raises what is returned."""
        self.problems.append((origin or nearest(self.marks, at)).problem(what, remedy))
        return Bad()

    # -------------------------------------------------------------- tables

    def table(self, cls: type[Any], raw: Any, at: Key, name: str = "") -> Any:
        """An instance of the attrs class `cls`. `name` is how problems call the table."""
        name = name or (f"[{dotted(at)}]" if at else "the configuration")
        if not isinstance(raw, Mapping):
            raise self.bad(at, f"{dotted(at)} must be a table, {is_now(raw)}")
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
        except ConfigError as e:
            for problem in e.problems:
                self.bad(at, f"{name}: {problem.where}{': ' if problem.where else ''}{problem.what}", problem.remedy)
            raise Bad from None
        except Exception as e:  # the constructor of a plugin's class may raise anything
            raise self.bad(at, f"{name}: {e if isinstance(e, ValueError) else f'{type(e).__name__}: {e}'}") from None

    def _field(self, cls: type[Any], a: attrs.Attribute[Any], hints: Mapping[str, Any], raw: Any, at: Key) -> Any:
        if a.converter is not None:
            return raw
        if a.name not in hints:
            raise self.bad(at, f"the type of {cls.__name__}.{a.name}, {a.type!r}, cannot be resolved", "annotate options with types that exist at run time")
        return self.value(hints[a.name], raw, at, a.metadata, default=_default_use(a))

    def _validate(self, cls: type[Any], fields: Mapping[str, attrs.Attribute[Any]], values: Mapping[str, Any], at: Key) -> None:
        """Run each validator by itself, on a stand-in that holds what is known to be good, so that one failure does not hide the next."""
        stand_in = object.__new__(cls)
        for key, a in fields.items():
            if key in values:
                object.__setattr__(stand_in, a.name, values[key])
            elif a.default is not attrs.NOTHING:
                with contextlib.suppress(Exception):  # it may be made from a field that is itself wrong or missing
                    object.__setattr__(stand_in, a.name, _default(a, stand_in))
        for key, value in values.items():
            a = fields[key]
            if a.validator is None or a.converter is not None:
                continue
            try:
                a.validator(stand_in, a, value)
            except AttributeError:
                continue  # it looked at a required field that is itself wrong or missing
            except Exception as e:
                self.problems.append(nearest(self.marks, (*at, key)).problem(*refusal(e, a, (*at, key), value)))
        for place, what, remedy in conflicts(stand_in, at):
            self.problems.append(nearest(self.marks, place).problem(what, remedy))

    def _unknown(self, name: str, key: Any, known: Sequence[str], at: Key) -> None:
        place = (*at, key)
        origin = nearest(self.marks, place)
        close = close_to(str(key), known)
        if origin.kind == "env":
            written = origin.source.partition("=")[0]
            what = f"{written} matches no setting"
            remedy = f"did you mean {variable((*at, close))}{written[len(variable(place)) :]}?" if close else f"{name} has: {', '.join(known) or 'no keys'}"
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
        mark = self.marks.get(at)
        if wanted in (str, Path) and mark is not None and mark.text is not None and not isinstance(raw, str | Mapping | list):
            raw = mark.text
        number = type(raw) in (int, float)
        if wanted is float and number:
            return float(typing.cast("float", raw))
        if (wanted is timedelta or (wanted is float and metadata.get("duration"))) and (number or isinstance(raw, str)):
            seconds = self._seconds(raw, at)
            return seconds if wanted is float else timedelta(seconds=seconds)
        if wanted is int and type(raw) is int:
            return raw
        if wanted is Path and isinstance(raw, str):
            return Path(raw).expanduser()
        if wanted in (str, bool) and isinstance(raw, wanted):
            return raw
        if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
            return wanted(self._one_of([member.value for member in wanted], raw, at))
        if wanted in (type(None), None) and raw is None:
            return None
        if wanted not in SPOKEN and isinstance(wanted, type) and isinstance(raw, wanted):
            return raw
        raise self.bad(at, f"{dotted(at)} must be {spoken(wanted)}, {is_now(raw)}", remedy_for(wanted, raw))

    def _seconds(self, raw: Any, at: Key) -> float:
        if not isinstance(raw, str):
            return float(raw)
        if (found := _DURATION.fullmatch(raw.strip())) is None:
            raise self.bad(at, f"{dotted(at)} must be a number of seconds, {is_now(raw)}", 'write 0.5, "500ms", "30s", "10m" or "1h"')
        return float(found[1]) * _SECONDS[found[2]]

    def _one_of(self, choices: Sequence[Any], raw: Any, at: Key) -> Any:
        for choice in choices:
            if type(choice) is type(raw) and choice == raw:
                return raw
        close = close_to(str(raw), [str(choice) for choice in choices])
        raise self.bad(at, f"{dotted(at)} must be one of {', '.join(map(repr, choices))}, {is_now(raw)}", f"did you mean {close!r}?" if close else "")

    def _union(self, args: Sequence[Any], raw: Any, at: Key, metadata: Mapping[str, Any], default: Use | None) -> Any:
        rest = [arg for arg in args if arg is not type(None)]
        if raw is None and len(rest) < len(args):
            return None
        if len(rest) == 1:
            return self.value(rest[0], raw, at, metadata, default=default)
        for arg in rest:
            attempt = Structurer(self.marks, self.plugins, self.environ, self.foreign)
            try:
                return attempt.value(arg, raw, at, metadata, default=default)
            except Bad:
                self._literals |= attempt._literals
        raise self.bad(at, f"{dotted(at)} must be {' or '.join(map(spoken, rest))}, {is_now(raw)}")

    def _sequence(self, origin: Any, args: Sequence[Any], raw: Any, at: Key, metadata: Mapping[str, Any]) -> Any:
        if not isinstance(raw, list | tuple):
            tables = bool(args) and attrs.has(args[0]) and args[0] is not Use
            what, remedy = ("an array of tables", f"write [[{dotted(at)}]], with two brackets") if tables else ("an array", "put it in [ ]")
            raise self.bad(at, f"{dotted(at)} must be {what}, {is_now(raw)}", remedy)
        items: Sequence[Any] = raw
        fixed = origin is tuple and not (len(args) == 2 and args[1] is Ellipsis)
        if fixed and len(items) != len(args):
            raise self.bad(at, f"{dotted(at)} must have {len(args)} elements, it has {len(items)}")
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
            raise self.bad(at, f"{dotted(at)} must be a table, {is_now(raw)}")
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
        article = f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind.replace('_', ' ')}"
        origin = nearest(self.marks, at)
        if isinstance(raw, Use):
            return raw
        if isinstance(raw, str):
            raw = {"use": raw}
        if not isinstance(raw, Mapping):
            raise self.bad(at, f"{dotted(at)} must name {article}, {is_now(raw)}", f'write {at[-1]} = "NAME" or {at[-1]} = {{ use = "NAME", ... }}')
        options = dict(raw)
        name = options.pop("use", None if default is None else default.name)
        if name is None:
            close = close_to("use", [str(key) for key in options])
            remedy = f"did you mean `use` instead of {close!r}?" if close else 'add use = "NAME"'
            raise self.bad(at, f"{dotted(at)} does not say which {kind.replace('_', ' ')} to use", remedy)
        if not isinstance(name, str) or not name:
            raise self.bad((*at, "use"), f"{dotted((*at, 'use'))} must be the name of {article}, {is_now(name)}")
        weight = 1.0
        before = len(self.problems)
        if "weight" in metadata.get("reserved", ()) and "weight" in options:
            try:
                weight = self.value(float, options.pop("weight"), (*at, "weight"))
                if not math.isfinite(weight):
                    raise self.bad((*at, "weight"), f"{dotted((*at, 'weight'))} must be finite: {weight}")
            except Bad:
                pass
        marks = {key[len(at) :]: mark for key, mark in self.marks.items() if key[: len(at)] == at}
        marks.setdefault((), origin)
        chosen = Use(name, options, origin.where, weight, marks)
        if self.plugins is not None and kind and not self.foreign(at):
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
            raise self.bad(at, str(e), origin=named) from None
        named_so = f"{kind.replace('_', ' ')} {use.name!r}"
        if isinstance(implementation, type) and attrs.has(implementation):
            return self.table(implementation, use.options, at, named_so)
        for key in use.options:
            self._unknown(named_so, key, (), at)
        if use.options:
            raise Bad
        return implementation

    def secret(self, raw: Any, at: Key) -> Secret:
        scheme, _, rest = raw.partition(":") if isinstance(raw, str) else ("", "", "")
        if self.foreign(at) and scheme in ("env", "file") and rest:
            return Secret("", str(raw))
        if scheme == "env" and rest:
            if (found := self.environ.get(rest)) is None:
                raise self.bad(at, f"{dotted(at)}: the environment variable {rest} is not set")
            if not found:  # whoever compares with it would let everybody in
                raise self.bad(at, f"{dotted(at)}: the environment variable {rest} is empty")
            return Secret(found, str(raw))
        if scheme == "file" and rest:
            try:
                found = Path(rest).expanduser().read_text("utf-8").strip()
            except (OSError, ValueError) as e:
                reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
                raise self.bad(at, f"{dotted(at)}: the file {rest} cannot be read: {reason}") from None
            if not found:
                raise self.bad(at, f"{dotted(at)}: the file {rest} is empty")
            return Secret(found, str(raw))
        if isinstance(raw, str) and raw:
            self._literals.add(raw)
        raise self.bad(at, f"{dotted(at)} is a secret and must not stand in the configuration itself", 'write "file:/path/to/it" or "env:NAME"')

    def _masked(self, problem: Problem) -> Problem:
        for literal in sorted(self._literals, key=len, reverse=True):
            mask = [text.replace(literal, "***") for text in (problem.what, problem.where, problem.source, problem.remedy)]
            problem = Problem(*mask)
        return problem


def _reading_order(problem: Problem) -> tuple[str, int]:
    path, _, line = problem.where.rpartition(":")
    return (path, int(line)) if line.isdigit() else (problem.where, 0)


def _default(a: attrs.Attribute[Any], instance: Any = None) -> Any:
    default: Any = a.default
    if not isinstance(default, attrs.Factory):  # pyright: ignore[reportArgumentType]
        return default
    return default.factory(instance) if default.takes_self else default.factory()


def _default_use(a: attrs.Attribute[Any]) -> Use | None:
    default = _default(a) if "kind" in a.metadata else None
    return default if isinstance(default, Use) else None


def _hints(cls: type[Any]) -> dict[str, Any]:
    """Types of the fields; one that does not resolve is left out, so that it harms only those who set it."""
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except Exception:
        hints: dict[str, Any] = {}
        for a in attrs.fields(cls):
            space = next((vars(sys.modules[c.__module__]) for c in cls.__mro__ if a.name in inspect.get_annotations(c)), {})
            try:
                hints[a.name] = eval(a.type, dict(space)) if isinstance(a.type, str) else a.type
            except Exception:
                continue
        return hints
