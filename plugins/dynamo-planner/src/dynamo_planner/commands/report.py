# ruff: noqa: T201
from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dynamo_core.cli.options import ConfigFile, Overrides
from dynamo_planner.commands.journal import JournalFile, decisions


def report(
    file: ConfigFile = None, /, *,
    out: Annotated[Path, Parameter(help="The page to write.")] = Path("planner.html"),
    journal: JournalFile = None, overrides: Overrides = (),
) -> int:
    """Write a page with plots of load, forecast and replicas, and with every decision that changed something."""
    from dynamo_planner.explain.page import page

    kept, table = decisions(file, overrides, journal)
    out.write_text(page(kept, ttft=table.ttft if table is not None else None, itl=table.itl if table is not None else None), "utf-8")
    print(f"{out}: {len(kept)} decisions")
    return 0
