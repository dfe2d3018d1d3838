from __future__ import annotations

import json as jsonlib
from typing import Annotated
from urllib.parse import quote

from cyclopts import Parameter

from dynamo_core.cli.http import connect, get, refusal
from dynamo_core.cli.options import Json, Key, Url
from dynamo_core.errors import Unavailable


def explain(
    id: Annotated[str, Parameter(name="ID", help="Of a decision (the header x-dynamo-decision) or of a request.")],
    /,
    *,
    url: Url = "http://127.0.0.1:8000",
    key: Key = None,
    json: Json = False,
) -> None:
    """Say why a request went to the worker it went to."""
    with connect(url, timeout=10.0, key=key) as client:
        response = get(client, f"/debug/decisions/{quote(id, safe='')}")
    if response.status_code == 404:
        raise Unavailable(f"{url} knows no decision {id!r}: it keeps the latest ones (router.decisions) of its own processes")
    if response.status_code != 200:
        raise Unavailable(f"{url} answered {response.status_code}: {refusal(response)}")
    record = response.json()
    print(jsonlib.dumps(record, indent=2) if json else record.get("text") or jsonlib.dumps(record, indent=2))
