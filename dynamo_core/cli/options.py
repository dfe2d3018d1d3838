"""Parameters that several commands have, so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

ConfigFile = Annotated[Path | None, Parameter(name="FILE", help="TOML or YAML. Default: $DYNAMO_CONFIG.", show_default=False)]
Overrides = Annotated[tuple[str, ...], Parameter(name="--set", negative=(), show_default=False, help="Override one setting: --set router.temperature=0.2")]
Json = Annotated[bool, Parameter(name="--json", negative=(), show_default=False, help="Print JSON for programs.")]
Url = Annotated[str, Parameter(name="--url", help="Where the frontend is.")]
Key = Annotated[str | None, Parameter(name="--key", show_default=False, help="What the frontend asks for: an API key, as env:NAME or file:PATH.")]
