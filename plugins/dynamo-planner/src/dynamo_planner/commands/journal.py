"""Where commands find the decisions that were recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dynamo_core.config import load_with_plugins
from dynamo_core.errors import ConfigError, Problem
from dynamo_planner import build
from dynamo_planner.config import Planner
from dynamo_planner.record import Decision, read_journal

JournalFile = Annotated[Path | None, Parameter(name="--journal", show_default=False, help="The file of decisions. Default: planner.record.")]


def decisions(file: Path | None, overrides: Sequence[str], journal: Path | None) -> tuple[list[Decision], Planner | None]:
    """What was recorded, and the `[planner]` table where a configuration is at hand.

    :raises ConfigError: there is no journal, or nobody says where it is.
    """
    if journal is not None and file is None:
        return read_journal(journal), None
    table = build.settings(*load_with_plugins(file, overrides=overrides))
    path = journal if journal is not None else table.record
    if path is None:
        raise ConfigError(Problem("the planner keeps no journal", remedy='set planner.record = "decisions.jsonl", or name one: --journal FILE'))
    return read_journal(path), table
