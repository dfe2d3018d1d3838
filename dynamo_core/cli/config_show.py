from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from dynamo_core.cli.options import Overrides
from dynamo_core.config import Setting, origins, plugins_for
from dynamo_core.config.emit import nested, to_toml, value_text
from dynamo_core.errors import ConfigError, Problem

_SUFFIXES = (".toml", ".yaml", ".yml")


def config_show(
    file: Annotated[str | None, Parameter(name="FILE", help="TOML or YAML. Default: $DYNAMO_CONFIG.", show_default=False)] = None,
    prefix: Annotated[str | None, Parameter(name="PREFIX", help="Only settings below this one: router.decode", show_default=False)] = None,
    /,
    *,
    origin: Annotated[bool, Parameter(name="--origin", negative=(), show_default=False, help="One line for each setting, with where it comes from.")] = False,
    format: Annotated[Literal["toml", "json"], Parameter(name="--format")] = "toml",
    set: Overrides = (),
) -> None:
    """Show the configuration in use: the file, the environment, --set and the defaults together."""
    if file is not None and prefix is None and not file.endswith(_SUFFIXES) and not Path(file).exists():
        file, prefix = None, file
    path = None if file is None else Path(file)
    settings = origins(path, overrides=set, plugins=plugins_for(path, overrides=set))
    if prefix is not None:
        settings = _below(settings, prefix)
    if not origin:
        data = nested(settings)
        print(json.dumps(data, indent=2) if format == "json" else to_toml(data), end="\n" if format == "json" else "")
    elif format == "json":
        print(json.dumps([{"name": s.name, "value": s.value, "origin": s.origin} for s in settings], indent=2))
    else:
        name_width = max(len(s.name) for s in settings)
        values = [value_text(s.value) for s in settings]
        value_width = min(40, max(map(len, values)))
        for setting, value in zip(settings, values, strict=True):
            print(f"{setting.name:<{name_width}}  {value:<{value_width}}  {setting.origin}")


def _below(settings: list[Setting], prefix: str) -> list[Setting]:
    wanted = tuple(prefix.replace("[", ".").replace("]", "").split("."))
    found = [s for s in settings if tuple(map(str, s.key))[: len(wanted)] == wanted]
    if not found:
        raise ConfigError(Problem(f"there is no setting {prefix!r}", remedy="`dynamo config show` shows them all"))
    return found
