"""What a server says of itself: its models, its cache, its load, where it publishes KV events."""

from __future__ import annotations

import math
import re
import ssl
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import attrs
import httpx
import msgspec

from dynamo_core.errors import ConfigError, Problem
from dynamo_core.httpx_client import HttpClient
from dynamo_core.types import Load

_ANSWER = 10.0
"""Seconds that a server has to say something of itself."""
_NONSENSE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Unreachable(Exception):
    """Nobody answers there, at present."""


class Slow(Unreachable):
    """Somebody is there, and takes its time."""


class Model(msgspec.Struct, frozen=True):
    """One entry of `GET /v1/models`."""

    id: str
    root: str | None = None
    parent: str | None = None
    """Of a LoRA adapter: its base model."""
    max_model_len: int | None = None
    owned_by: str = ""


class _Models(msgspec.Struct):
    data: list[Model]


@attrs.frozen
class Cache:
    """What vLLM's metrics tell of the KV cache of each rank."""

    block_size: int | None = None
    total_blocks: int | None = None
    """Of one rank."""
    prefixes: bool = True
    """Prefixes are cached."""
    ranks: int | None = None
    """Data-parallel ranks."""


class _KvSource(msgspec.Struct):
    endpoint: str
    publisher: str = "zmq"
    enable_kv_cache_events: bool = True
    replay_endpoint: str | None = None


class Server:
    """Asks one server; what its requests need goes another way (`connection`)."""

    def __init__(self, url: str, headers: dict[str, str], connect_timeout: float) -> None:
        self.url = url
        timeout = httpx.Timeout(_ANSWER, connect=connect_timeout)
        # httpx by itself trusts a list of its own, and neither what the machine trusts nor SSL_CERT_FILE.
        trusted = False if urlsplit(url).scheme == "http" else ssl.create_default_context()
        self._client = HttpClient(base_url=url, headers=headers, timeout=timeout, trust_env=False, verify=trusted)
        self._has_metrics = True

    async def close(self) -> None:
        await self._client.aclose()

    async def models(self) -> Sequence[Model]:
        """:raises Unreachable: not now. :raises ConfigError: never, as long as the operator changes nothing."""
        answer = await self._get("/v1/models")
        if answer.status_code in (401, 403):
            raise ConfigError(Problem(f"{self.url} refuses to say which models it has ({answer.status_code})",
                                      remedy='set api_key = "env:NAME" or "file:/path" to the key that the server was started with'))  # fmt: skip
        if answer.status_code in (502, 503, 504):
            raise Unreachable(f"it answers {answer.status_code}")
        try:
            if answer.status_code == 200:
                return msgspec.json.decode(answer.content, type=_Models).data
        except _NONSENSE:
            pass
        raise ConfigError(Problem(f"{self.url}/v1/models does not list models ({answer.status_code}): it is no OpenAI-compatible server",
                                  remedy="`url` is what comes before /v1: http://host:8000"))  # fmt: skip

    async def version(self) -> str:
        """Of vLLM; empty where the server does not tell."""
        try:
            answer = await self._get("/version")
            return str(msgspec.json.decode(answer.content, type=dict[str, Any])["version"]) if answer.status_code == 200 else ""
        except (Unreachable, KeyError, *_NONSENSE):
            return ""

    async def metrics(self) -> str:
        """Prometheus' text; empty where there is none. :raises Unreachable: not now."""
        if not self._has_metrics:
            return ""
        answer = await self._get("/metrics")
        self._has_metrics = answer.status_code not in (401, 403, 404, 405, 501)
        return answer.text if answer.status_code == 200 else ""

    async def kv_sources(self) -> dict[int, tuple[str, str | None]]:
        """Where vLLM says that it publishes the KV events of each rank; addresses that say only on which port are on the server's host."""
        try:
            answer = await self._get("/kv_event_sources")
            found = msgspec.json.decode(answer.content, type=dict[int, _KvSource], strict=False) if answer.status_code == 200 else {}
        except (Unreachable, *_NONSENSE):
            return {}
        return {rank: (self._reached(source.endpoint), self._reached(source.replay_endpoint) if source.replay_endpoint else None)
                for rank, source in found.items() if source.publisher == "zmq" and source.enable_kv_cache_events}  # fmt: skip

    def _reached(self, endpoint: str) -> str:
        host = urlsplit(self.url).hostname or ""
        return re.sub(r"^tcp://(\*|0\.0\.0\.0|\[::\]):", f"tcp://{f'[{host}]' if ':' in host else host}:", endpoint)

    async def _get(self, path: str) -> httpx.Response:
        try:
            return await self._client.get(path)
        except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout) as e:
            raise Slow(f"no answer within {_ANSWER:g} s") from e
        except httpx.ConnectError as e:
            raise Unreachable(str(e) or "no connection") from e
        except httpx.HTTPError as e:
            raise Unreachable(f"{type(e).__name__}: {e}".rstrip(": ")) from e


# ------------------------------------------------------------------ vLLM's metrics

_SERIES = re.compile(r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{([^}]*)\} (\S+)$", re.MULTILINE)
_CACHE = re.compile(r"^vllm:cache_config_info\{(.*)\} \S+$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def cache_of(page: str) -> Cache:
    """What the page tells; nothing where it is not vLLM's."""
    infos = [dict(_LABEL.findall(labels)) for labels in _CACHE.findall(page)]
    if not infos:
        return Cache()
    ranks = len({info.get("engine") for info in infos})
    blocks = _whole(infos[0].get("num_gpu_blocks"))  # vLLM adds up what the ranks have
    return Cache(_whole(infos[0].get("block_size")), None if blocks is None else blocks // ranks, infos[0].get("enable_prefix_caching") != "False", ranks)


def loads_of(page: str, total_blocks: int) -> list[Load]:
    """How busy each rank is; empty where the page does not tell. :param total_blocks: of one rank."""
    ranks: dict[int, dict[str, float]] = {}
    for name, labels, value in _SERIES.findall(page):
        rank = _whole(dict(_LABEL.findall(labels)).get("engine")) or 0
        of_rank = ranks.setdefault(rank, {})
        of_rank[name] = of_rank.get(name, 0.0) + _number(value)
    return [
        Load(int(found.get("num_requests_running", 0)), int(found.get("num_requests_waiting", 0)),
             round(min(1.0, found.get("kv_cache_usage_perc", 0.0)) * total_blocks), total_blocks, 0, rank)
        for rank, found in sorted(ranks.items())
    ]  # fmt: skip


def _number(text: str) -> float:
    """0 for what is none."""
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
