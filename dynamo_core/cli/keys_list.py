from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from dynamo_core.cli.options import Json


def keys_list(*, file: Annotated[Path, Parameter(help="The file of keys.")], json: Json = False) -> None:
    """List API keys by id: whose they are, since when, until when."""
    from dynamo_core.frontend.keyfile import read

    records = sorted(read(file).keys, key=lambda record: (record.tenant, record.created))
    if json:
        print(msgspec.json.encode([{k: v for k, v in msgspec.to_builtins(record).items() if k != "hash"} for record in records]).decode())
        return
    for record in records:
        until = f"until {_day(record.expires)}" if record.expires else ""
        print(f"{record.id}  {record.tenant:<24} {_day(record.created)}  {until:<16} {'admin' if record.admin else '':<6} {record.note}".rstrip())


def _day(unix: int) -> str:
    return f"{datetime.fromtimestamp(unix, UTC):%Y-%m-%d}"
