from __future__ import annotations

import keyword
import re
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dynamo_core.cli.scaffold import SCAFFOLDS, project
from dynamo_core.errors import ConfigError, Problem


def plugin_new(
    kind: Annotated[str, Parameter(name="KIND", help="What it provides: " + ", ".join(SCAFFOLDS))],
    name: Annotated[str, Parameter(name="NAME", help="Under which users select it: my-router")],
    /,
    *,
    dir: Annotated[Path, Parameter(name="--dir", help="Where the project's directory is made.")] = Path(),
) -> None:
    """Write a new plugin: a package of a few files that passes its contract tests as it stands."""
    if kind not in SCAFFOLDS:
        raise ConfigError(Problem(f"there is no scaffold for {kind!r}", remedy=f"there are: {', '.join(SCAFFOLDS)}"))
    name = name.removeprefix("dynamo-")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise ConfigError(Problem(f"{name!r} is not a name for a plugin", remedy="lower-case words and digits, joined by hyphens: my-router"))
    root = dir / f"dynamo-{name}"
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(Problem("already exists", str(root), remedy="choose another name, or another place with --dir"))
    for path, content in project(kind, name).items():
        file = root / path
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
        except OSError as e:
            raise ConfigError(Problem(f"cannot be written: {e.strerror}", str(file))) from e
        print(file)
    print(f"\nnow:  pip install -e '{root}[test]' && pytest {root}\nthen: dynamo plugin check {root}")
