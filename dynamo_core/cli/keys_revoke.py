from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def keys_revoke(
    id: Annotated[str, Parameter(name="ID", help="As `dynamo keys list` shows it, or the key itself.")],
    /,
    *,
    file: Annotated[Path, Parameter(help="The file of keys.")],
) -> None:
    """Revoke an API key. Frontends refuse it within a second."""
    from dynamo_core.frontend.keyfile import revoke

    record = revoke(file, id)
    print(f"revoked {record.id} of {record.tenant}")
