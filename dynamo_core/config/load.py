"""From files, variables and options to one checked `Config`: override > environment > file > default."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs

from dynamo_core.config.layers import apply_environment, apply_overrides
from dynamo_core.config.schema import Config, Use
from dynamo_core.config.structure import Bad, Structurer
from dynamo_core.config.toml import read_toml
from dynamo_core.config.tree import Key, Origin, Tree
from dynamo_core.config.yaml import read_yaml
from dynamo_core.errors import ConfigError, Problem
from dynamo_core.plugins import Plugins

T = TypeVar("T")


Foreign = Callable[[Key, Mapping[str, Any]], bool]
"""Whether a place, such as `("workers", 0, "engine")`, is for processes of another role, given the whole configuration as written."""


def _nothing(at: Key, written: Mapping[str, Any]) -> bool:
    """Every place is for this process."""
    return False


def tables_inside(written: Mapping[str, Any]) -> set[int]:
    """Numbers of the `[[workers]]` tables that say, as written and not yet checked, that the process that routes runs them."""
    tables: Any = written.get("workers")
    return {number for number, table in enumerate(tables) if isinstance(table, Mapping) and table.get("inside") is True} if isinstance(tables, list) else set()  # pyright: ignore[reportUnknownArgumentType,reportUnknownVariableType,reportUnknownMemberType]


def load(path: Path | None = None, *, text: str | None = None, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ,
         plugins: Plugins | None = None, foreign: Foreign = _nothing) -> Config:
    """Read, layer and check a configuration. `text` stands for the content of `path`; without both, `DYNAMO_CONFIG` names the file.

    With `plugins`, each component that is used is imported and its options are checked: but not where `foreign` says that a place
    is for processes of another role. Their plugins need not be installed here, and their secrets (empty) not be readable.

    :raises ConfigError: with every problem at once.
    """
    return resolve(path, text=text, overrides=overrides, environ=environ, plugins=plugins, foreign=foreign)[0]


def load_with_plugins(path: Path | None = None, *, text: str | None = None, overrides: Sequence[str] = (),
                      environ: Mapping[str, str] = os.environ, foreign: Foreign = _nothing) -> tuple[Config, Plugins]:
    """What a process does at start: the plugins, less those that the configuration itself turns off, and the configuration checked against them.

    :raises ConfigError: with every problem at once.
    """
    plugins = plugins_for(path, text=text, overrides=overrides, environ=environ)
    return load(path, text=text, overrides=overrides, environ=environ, plugins=plugins, foreign=foreign), plugins


def plugins_for(path: Path | None = None, *, text: str | None = None, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> Plugins:
    """The installed plugins, less `plugins.disabled`. Never fails: what is wrong with the configuration is for `load` to say."""
    tree, _ = _layered(path, text, overrides, environ)
    table: Any = tree.data.get("plugins")
    names: Any = table.get("disabled") if isinstance(table, dict) else None
    return Plugins.load(disabled=[name for name in names if isinstance(name, str)] if isinstance(names, list) else ())


def check(path: Path | None = None, *, text: str | None = None, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ,
          plugins: Plugins | None = None) -> list[Problem]:
    """What `load` would complain about."""
    try:
        resolve(path, text=text, overrides=overrides, environ=environ, plugins=plugins)
    except ConfigError as e:
        return list(e.problems)
    return []


def resolve(path: Path | None, *, text: str | None, overrides: Sequence[str], environ: Mapping[str, str], plugins: Plugins | None,
            foreign: Foreign = _nothing) -> tuple[Config, Tree]:
    """The configuration, and the tree that says where each of its values was written."""
    tree, problems = _layered(path, text, overrides, environ)
    structurer = Structurer(tree.marks, plugins, environ, lambda at: foreign(at, tree.data))
    structurer.problems.extend(problems)
    try:
        config: Config = structurer.table(Config, tree.data, ())
    except Bad:
        config = Config()
    structurer.finish()
    return config, tree


def _layered(path: Path | None, text: str | None, overrides: Sequence[str], environ: Mapping[str, str]) -> tuple[Tree, list[Problem]]:
    if path is None and text is None and environ.get("DYNAMO_CONFIG"):
        path = Path(environ["DYNAMO_CONFIG"])
    problems: list[Problem] = []
    tree = Tree()
    if path is not None or text is not None:
        try:
            tree = read(path, text)
        except ConfigError as e:
            problems.extend(e.problems)
    problems += [*apply_environment(tree, environ), *apply_overrides(tree, overrides)]
    return tree, problems


def read(path: Path | None, text: str | None) -> Tree:
    """Parse one file by its extension; text without a path is TOML. :raises ConfigError: it is missing, unreadable or malformed."""
    name = str(path) if path is not None else "<text>"
    suffix = path.suffix.lower() if path is not None else ".toml"
    if suffix not in (".toml", ".yaml", ".yml"):
        raise ConfigError(Problem("a configuration is a .toml, .yaml or .yml file", name))
    if text is None:
        assert path is not None
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as e:
            line = e.object[: e.start].count(b"\n") + 1
            raise ConfigError(Problem(f"byte {e.object[e.start]:#04x} is not UTF-8", f"{name}:{line}")) from None
        except OSError as e:
            raise ConfigError(Problem(f"cannot be read: {e.strerror}", name, remedy=_neighbour(path))) from None
        except ValueError as e:
            raise ConfigError(Problem(f"is not a file name: {e}", name)) from None
    return read_toml(text, name) if suffix == ".toml" else read_yaml(text, name)


def _neighbour(path: Path) -> str:
    try:
        around = [p.name for p in path.parent.iterdir() if p.suffix in (".toml", ".yaml", ".yml")] if not path.exists() else []
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, around, 1)
    return f"did you mean {path.parent / close[0]}?" if close else ""


def build(use: Use, kind: str, plugins: Plugins, *, environ: Mapping[str, str] = os.environ) -> Any:
    """Import the component that `use` names and make it, with its options as the fields of its attrs class.

    A component that is not an attrs class takes no options; a class is called without arguments.

    :raises ConfigError: nobody provides it, it does not import, or an option is wrong; with the place in the file.
    """
    structurer = Structurer(use.marks or {(): Origin("file", use.where)}, plugins, environ)
    try:
        component = structurer.component(use, kind, (), plugins)
    except Bad:
        component = None
    structurer.finish()
    return component() if isinstance(component, type) and not attrs.has(component) else component


def structure(cls: type[T], data: Mapping[str, Any], *, where: str = "", plugins: Plugins | None = None, environ: Mapping[str, str] = os.environ) -> T:
    """Plain data as an instance of an attrs class, by the rules of the configuration. `where` is the place that problems name.

    :raises ConfigError: with every problem at once.
    """
    marks: Mapping[Key, Origin] = {(): Origin("file", where)}
    structurer = Structurer(marks, plugins, environ)
    result: Any = None
    try:
        result = structurer.table(cls, data, ())
    except Bad:
        pass
    structurer.finish()
    return result



