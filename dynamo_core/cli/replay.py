from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from dynamo_core.cli.commands import run
from dynamo_core.errors import ConfigError, Problem
from dynamo_core.plugins import Plugins

_KINDS = {"trace": "dynamo-sim", "decisions": "dynamo-core"}
"""What a file can hold, and the distribution that replays it."""


def replay(
    file: Annotated[Path, Parameter(name="FILE", help="A request trace, or decision records; JSON lines.")],
    /,
    *options: Annotated[str, Parameter(allow_leading_hyphen=True, help="See `dynamo replay trace --help`, `dynamo replay decisions --help`.")],
) -> int:
    """Replay a file: a request trace in virtual time, or recorded decisions against another stack. Its first line says which it is."""
    kind = _kind_of(file)
    component = Plugins.load().of_kind("cli").get(f"replay {kind}")
    if component is None:
        raise ConfigError(Problem(f"this is a file of {kind}, and nothing installed replays it", str(file), remedy=f"pip install {_KINDS[kind]}"))
    return run(component, [str(file), *options])


def _kind_of(file: Path) -> str:
    try:
        with file.open("rb") as lines:
            first = next((line for line in lines if line.strip()), b"")
    except OSError as e:
        raise ConfigError(Problem(f"it cannot be read: {e.strerror}", str(file))) from e
    try:
        record = msgspec.json.decode(first, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        record = {}
    if "columns" in record and "workers" in record:
        return "decisions"
    if "hash_ids" in record or "input_length" in record:
        return "trace"
    shown = first[:120].decode("utf-8", "replace")
    remedy = "a trace has input_length, output_length and hash_ids in each line; a decision record has workers and columns"
    raise ConfigError(Problem("its first line is neither a request of a trace nor a decision record", f"{file}:1", shown, remedy))
