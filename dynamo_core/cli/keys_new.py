from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def keys_new(
    tenant: Annotated[str, Parameter(name="TENANT", help="On whose behalf requests with this key run.")],
    /,
    *,
    file: Annotated[Path, Parameter(help="Where the authenticator `api-keys` looks.")],
    note: Annotated[str, Parameter(help="For people: who has it, and what for.")] = "",
    admin: Annotated[bool, Parameter(negative=(), help="May read /debug.")] = False,
    days: Annotated[float | None, Parameter(help="After so many days it is refused.")] = None,
) -> None:
    """Make an API key and print it. Only its hash is kept: it cannot be shown again."""
    from dynamo_core.frontend.keyfile import add

    key, _ = add(file, tenant, note=note, admin=admin, days=days)
    print(key)
