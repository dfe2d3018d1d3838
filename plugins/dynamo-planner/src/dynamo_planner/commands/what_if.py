# ruff: noqa: T201
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import attrs
import msgspec
from cyclopts import Parameter

from dynamo_core.cli.options import Json, Overrides
from dynamo_core.config import load_with_plugins
from dynamo_planner.commands.journal import JournalFile


def what_if(
    *words: Annotated[str, Parameter(help="The configuration, and changes: load=2x, prompt=1.5x, output=0.5x.")],
    journal: JournalFile = None, json: Json = False, overrides: Overrides = (),
) -> int:
    """Decide for the recorded load again, with another load or other settings (--set planner.ttft=300ms). Changes nothing."""
    from dynamo_planner import build
    from dynamo_planner.commands.journal import decisions
    from dynamo_planner.explain import what_if as again
    from dynamo_planner.explain.text import explain

    files = [word for word in words if "=" not in word]
    factors = again.changes([word for word in words if "=" in word])
    file = Path(files[0]) if files else None
    config, plugins = load_with_plugins(file, overrides=overrides)
    table = build.settings(config, plugins)
    past, _ = decisions(file, overrides, journal if journal is not None else table.record)
    # As if it lasted: nobody wants to know that the planner would first wait and see.
    decision = again.what_if(build.mind(attrs.evolve(table, patience=0.0, max_step=10_000), plugins), past, factors)
    print(msgspec.json.encode(decision).decode() if json else explain(decision))
    return 0
