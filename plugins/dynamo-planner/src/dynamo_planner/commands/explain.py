# ruff: noqa: T201
from __future__ import annotations

import sys
from typing import Annotated

import msgspec
from cyclopts import Parameter

from dynamo_core.cli.options import ConfigFile, Json, Overrides
from dynamo_planner.commands.journal import JournalFile, decisions


def explain(
    file: ConfigFile = None, /, *,
    number: Annotated[int | None, Parameter(help="Which decision. Default: the last one.", show_default=False)] = None,
    last: Annotated[int, Parameter(help="So many of the last decisions that changed something.", show_default=False)] = 0,
    journal: JournalFile = None, json: Json = False, overrides: Overrides = (),
) -> int:
    """Say why there are so many workers: load, forecast, proposals, and the constraint that won."""
    from dynamo_planner.explain.text import explain as text

    kept, _ = decisions(file, overrides, journal)
    found = [d for d in kept if d.action != "kept"][-last:] if last > 0 else [d for d in kept if number in (None, d.number)][-1:]
    if not found:
        known = f"; {kept[0].number} to {kept[-1].number} are" if kept else ""
        print(f"dynamo planner explain: decision {'' if number is None else f'{number} '}is not recorded{known}", file=sys.stderr)
        return 1
    print("\n\n".join(msgspec.json.encode(d).decode() if json else text(d) for d in found))
    return 0
