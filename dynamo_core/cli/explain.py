from __future__ import annotations

import json as jsonlib
from typing import Annotated, Any
from urllib.parse import quote

import httpx
from cyclopts import Parameter

from dynamo_core.cli.http import connect, get, refusal
from dynamo_core.cli.options import Json, Key, Url
from dynamo_core.errors import Unavailable


def explain(
    id: Annotated[str, Parameter(name="ID", help="Of a decision, or several (the header x-dynamo-decision), or of a request.")],
    /,
    *,
    url: Url = "http://127.0.0.1:8000",
    key: Key = None,
    json: Json = False,
) -> None:
    """Say why a request went to the worker it went to."""
    with connect(url, timeout=10.0, key=key) as client:
        records = [_record(client, url, id)]
        if records == [None] and "," in id:
            # The header of a request that several workers served names all of its decisions.
            records = [_record(client, url, each) for each in id.split(",")]
    found = [record for record in records if record is not None]
    if not found:
        raise Unavailable(f"{url} knows no decision {id!r}: it keeps the latest ones (router.decisions) of its own processes")
    if json:
        print(jsonlib.dumps(found[0] if len(records) == 1 else found, indent=2))
    else:
        print("\n\n".join(record.get("text") or jsonlib.dumps(record, indent=2) for record in found))


def _record(client: httpx.Client, url: str, id: str) -> dict[str, Any] | None:
    """`None`: it is not known there. :raises Unavailable: it cannot be asked."""
    response = get(client, f"/debug/decisions/{quote(id.strip(), safe='')}")
    if response.status_code == 404:
        return None
    if response.status_code != 200:
        raise Unavailable(f"{url} answered {response.status_code}: {refusal(response)}")
    return response.json()
