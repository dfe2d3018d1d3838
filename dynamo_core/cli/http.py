"""Asking a frontend, with errors that say what to do."""

from __future__ import annotations

import attrs
import httpx

from dynamo_core.config import Secret, structure
from dynamo_core.errors import Unavailable


@attrs.frozen
class _Caller:
    key: Secret | None


def connect(url: str, *, timeout: float, key: str | None = None) -> httpx.Client:
    """A client of the frontend at `url`. :raises Unavailable: that is no URL. :raises ConfigError: `key` is no reference to a secret."""
    secret = structure(_Caller, {"key": key}, where="--key").key
    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    try:
        return httpx.Client(base_url=url, timeout=httpx.Timeout(timeout, connect=5.0), headers=headers)
    except (httpx.InvalidURL, ValueError) as e:
        raise Unavailable(f"{url!r} is not a URL: {e}") from e


def get(client: httpx.Client, path: str) -> httpx.Response:
    """:raises Unavailable: nobody answers there."""
    try:
        return client.get(path)
    except httpx.HTTPError as e:
        raise unreachable(client, e) from e


def unreachable(client: httpx.Client, error: httpx.HTTPError) -> Unavailable:
    reason = str(error) or type(error).__name__
    return Unavailable(f"the frontend at {str(client.base_url).rstrip('/')} does not answer ({reason}); is it running? --url says where to look")


def refusal(response: httpx.Response) -> str:
    """The message of an OpenAI-shaped error."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
