"""The configuration in use, setting by setting, with the place where each value was written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from dynamo_core.config.load import resolve
from dynamo_core.config.schema import Secret, Use
from dynamo_core.config.tree import Key, Tree, dotted
from dynamo_core.errors import DynamoError
from dynamo_core.plugins import Component, Plugins


@attrs.frozen
class Setting:
    key: Key
    value: Any
    """A TOML value, or `None` for a setting that is off. A secret is its reference, never itself."""
    origin: str
    """`path:line`, `environment variable NAME`, `--set KEY` or `default`."""

    @property
    def name(self) -> str:
        return dotted(self.key)


def origins(path: Path | None = None, *, text: str | None = None, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ,
            plugins: Plugins | None = None) -> list[Setting]:
    """Every setting of the configuration that `load` would return. With `plugins`, the defaults of chosen components are listed too.

    :raises ConfigError: with every problem at once.
    """
    config, tree = resolve(path, text=text, overrides=overrides, environ=environ, plugins=plugins)
    return list(_table(config, (), tree, plugins))


def _table(table: Any, at: Key, tree: Tree, plugins: Plugins | None) -> Iterator[Setting]:
    for a in attrs.fields(type(table)):
        yield from _value(getattr(table, a.name), (*at, a.alias), tree, plugins, str(a.metadata.get("kind", "")), "weight" in a.metadata.get("reserved", ()))


def _value(value: Any, at: Key, tree: Tree, plugins: Plugins | None, kind: str, weighted: bool) -> Iterator[Setting]:
    if isinstance(value, Use):
        yield from _use(value, at, tree, plugins, kind, weighted)
    elif attrs.has(type(value)):
        yield from _table(value, at, tree, plugins)
    elif isinstance(value, tuple) and value and (attrs.has(type(value[0]))):
        for i, item in enumerate(value):
            yield from _value(item, (*at, i), tree, plugins, kind, weighted)
    else:
        yield Setting(at, _plain(value), _origin(tree, at))


def _use(use: Use, at: Key, tree: Tree, plugins: Plugins | None, kind: str, weighted: bool) -> Iterator[Setting]:
    yield Setting((*at, "use"), use.name, _origin(tree, (*at, "use")))
    if weighted:
        yield Setting((*at, "weight"), use.weight, _origin(tree, (*at, "weight")))
    for option, value in use.options.items():
        yield Setting((*at, option), _plain(value), _origin(tree, (*at, option)))
    component = None if plugins is None else plugins.components.get((kind, use.name))
    if component is None:
        return
    for option, value in _defaults(component).items():
        if option not in use.options:
            yield Setting((*at, option), value, f"default ({component.plugin})")


def _defaults(component: Component) -> dict[str, Any]:
    try:
        implementation = component.load()
    except DynamoError:
        return {}
    if not (isinstance(implementation, type) and attrs.has(implementation)):
        return {}
    options = (a for a in attrs.fields(implementation) if a.init and a.default is not attrs.NOTHING)
    return {a.alias: _plain(a.default) for a in options if not hasattr(a.default, "takes_self")}


def _origin(tree: Tree, at: Key) -> str:
    """The mark of the value itself or of the inline value that holds it; an absent key of a written table is a default."""
    place: Any = tree.data
    for step in at:
        if isinstance(place, str):  # `picker = "best"` is short for a table with `use`
            return tree.origin(at).where if step == "use" else "default"
        present = range(len(place)) if isinstance(place, list) else place
        if step not in present:
            return "default"
        inner: Any = place
        place = inner[step]
    return tree.origin(at).where or "default"


def _plain(value: Any) -> Any:
    if isinstance(value, Secret):
        return value.reference
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def uses(table: Any) -> Iterator[tuple[str, Use]]:
    """Every choice of a component in the configuration: `(kind, use)`."""
    for a in attrs.fields(type(table)):
        value = getattr(table, a.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Use):
                yield str(a.metadata.get("kind", "")), item
            elif attrs.has(type(item)):
                yield from uses(item)
