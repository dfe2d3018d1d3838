from __future__ import annotations

import json as jsonlib
import sys
from typing import Annotated, Any

import attrs
from cyclopts import Parameter

from dynamo_core.cli.options import Json
from dynamo_core.errors import ConfigError, Problem
from dynamo_core.plugins import KINDS, Component, Plugins


def plugins(
    *,
    kind: Annotated[str | None, Parameter(name="--kind", help="Only components of this kind: scorer, engine, ...", show_default=False)] = None,
    json: Json = False,
) -> int:
    """List what is installed, and what is wrong with it. Imports no component. Exit code 1 when a plugin was left out."""
    if kind is not None and kind not in KINDS:
        raise ConfigError(Problem(f"there is no kind {kind!r}", "--kind", remedy=f"kinds: {', '.join(KINDS)}"))
    found = Plugins.load()
    rows = [(p, [c for c in found.components.values() if c.plugin == p and kind in (None, c.kind)]) for p in found.plugins]
    if json:
        print(jsonlib.dumps([{**attrs.asdict(p), "components": [_as_data(c) for c in components]} for p, components in rows], indent=2))
    else:
        for p, components in rows:
            if not components and kind is not None:
                continue
            print(f"{p.distribution or p.name} {p.version}  ({p.name}, {p.path or 'unknown place'})")
            for spoken, names in _by_kind(components).items():
                print(f"  {spoken:<16} {', '.join(names)}")
            if p.problem:
                print(f"  LEFT OUT: {p.problem}")
    broken = [p for p in found.plugins if p.problem and p.problem != "disabled by configuration"]
    if broken and not json:
        print(f"\n{len(broken)} left out: {', '.join(map(str, broken))}", file=sys.stderr)
    return 1 if broken else 0


def _by_kind(components: list[Component]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for c in components:
        mark = "" if c.stability == "stable" else f" ({c.stability})"
        mark += f" (deprecated: use {c.deprecated.use})" if c.deprecated else ""
        names.setdefault(c.kind, []).append(c.name + mark)
    return names


def _as_data(component: Component) -> dict[str, Any]:
    return attrs.asdict(component, filter=lambda a, _: a.name != "plugin")
