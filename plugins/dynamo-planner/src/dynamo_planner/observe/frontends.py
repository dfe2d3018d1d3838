"""The load, read from the frontends: from each one's `/metrics`, or from a Prometheus server that reads these."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import httpx
from prometheus_client.parser import text_string_to_metric_families

from dynamo_core.errors import ConfigError, Problem
from dynamo_core.httpx_client import HttpClient
from dynamo_planner.config import Metrics
from dynamo_planner.contract import Load
from dynamo_planner.observe.samples import NAMES, PRESENCE, START, Growth, Sample, SeveralProcesses, spread
from dynamo_planner.planning import Missing

_P = "dynamo_frontend_"


def http_client(settings: Metrics) -> httpx.AsyncClient:
    """:raises ConfigError: a certificate or a key cannot be used."""
    context = ssl.create_default_context()
    try:
        if settings.ca is not None:
            context = ssl.create_default_context(cafile=str(settings.ca))
        if settings.cert is not None and settings.key is not None:
            context.load_cert_chain(settings.cert, settings.key)
    except (OSError, ssl.SSLError) as e:
        named = ", ".join(str(path) for path in (settings.ca, settings.cert, settings.key) if path is not None)
        raise ConfigError(Problem(f"planner.metrics: TLS cannot be set up with {named}: {e}")) from e
    auth = httpx.BasicAuth(settings.user, settings.password) if settings.user is not None and settings.password is not None else None
    headers = {"authorization": f"Bearer {settings.token}"} if settings.token is not None else {}
    return HttpClient(verify=context, auth=auth, headers=headers, timeout=settings.timeout, trust_env=False)


@attrs.define(eq=False)
class FrontendLoad:
    """The load since the last look. One frontend that does not answer is a part that is missing: half of the load would pass for all of it."""

    settings: Metrics
    model: str | None
    client: httpx.AsyncClient
    _growth: dict[str, Growth] = attrs.field(init=False, factory=dict[str, Growth])
    _seen_at: dict[str, float] = attrs.field(init=False, factory=dict[str, float])
    _last: float | None = attrs.field(init=False, default=None)
    _looked: float | None = attrs.field(init=False, default=None)
    """Unix time of the look before."""
    _carried: dict[str, float] = attrs.field(init=False, factory=dict[str, float])
    """What was seen to grow while another part was missing; it belongs to the next load."""

    async def load(self, at: float) -> Load | None:
        """:raises Missing: a frontend or the server does not answer, or says what it should not."""
        found = await (self._server() if self.settings.prometheus else self._each())
        if not found:
            raise Missing(f"the load: {self.settings.prometheus} has no series {PRESENCE}; it does not scrape a frontend")
        gone = [who for who, seen in self._seen_at.items() if who not in found and at - seen < self.settings.forget]
        gauges = {f"{_P}inflight_requests": 0.0, f"{_P}held_requests": 0.0}
        for who, samples in found.items():
            try:
                grown = self._growth.setdefault(who, Growth(self._looked)).since_last(self._ours(samples), time.time())
            except SeveralProcesses:
                raise Missing(f"the load: several processes answer at {who} in turn; name the operators' address of each (frontend.admin)") from None
            self._seen_at[who] = at
            for name, value in grown.items():
                into = gauges if name in gauges else self._carried
                into[name] = into.get(name, 0.0) + value
        self._looked = time.time()
        for who in [who for who, seen in self._seen_at.items() if at - seen >= max(self.settings.forget, 1e-9)]:
            del self._seen_at[who], self._growth[who]
        if gone:
            raise Missing(f"the load: the frontend {', '.join(sorted(gone))} is not seen any more; it counts as gone after {self.settings.forget:g} s")
        since, self._last = self._last, at
        grown, self._carried = self._carried, {}
        return None if since is None or at <= since else _load(at, at - since, grown, gauges)

    def _ours(self, samples: Iterable[Sample]) -> list[Sample]:
        return [s for s in samples if self.model is None or s.label("model") in (None, self.model)]

    # -------------------------------------------------------------- from the frontends

    async def _each(self) -> dict[str, list[Sample]]:
        return {who: part for url in self.settings.frontends for who, part in _by_process(url, await self._one(url)).items()}

    async def _one(self, url: str) -> list[Sample]:
        text = (await self._get(f"{url.rstrip('/')}/metrics", {}, f"the frontend {url}")).text
        try:
            samples = [Sample(s.name, tuple(sorted(s.labels.items())), s.value)
                       for family in text_string_to_metric_families(text) for s in family.samples if s.name in NAMES]
        except ValueError as e:
            raise Missing(f"the load: {url}/metrics is not in Prometheus' format: {e}") from e
        if not any(s.name == PRESENCE for s in samples):
            raise Missing(f"the load: {url}/metrics is not of a frontend: it has no series {PRESENCE}")
        return samples

    # -------------------------------------------------------------- from a server

    async def _server(self) -> dict[str, list[Sample]]:
        base = str(self.settings.prometheus).rstrip("/")
        more = f",{self.settings.selector}" if self.settings.selector else ""
        names = "|".join(name for name in NAMES if name != START)
        query = f'{{__name__=~"{names}"{more}}} or ({START} and on (job, instance) {{__name__="{PRESENCE}"{more}}})'
        answer = await self._get(f"{base}/api/v1/query", {"query": query}, f"Prometheus at {base}")
        try:
            body: Any = answer.json()
            if body["status"] != "success":
                raise Missing(f"the load: Prometheus at {base} says {body.get('error', body['status'])!r}")
            rows: list[Any] = body["data"]["result"]
            by_target: dict[str, list[Sample]] = {}
            for row in rows:
                labels: dict[str, str] = dict(row["metric"])
                name = labels.pop("__name__")
                who = "/".join(labels.pop(part, "") for part in ("job", "instance"))
                by_target.setdefault(who, []).append(Sample(name, tuple(sorted(labels.items())), float(row["value"][1])))
        except (KeyError, TypeError, ValueError, json.JSONDecodeError) as e:
            raise Missing(f"the load: {base} answers, but not as a Prometheus server does: {type(e).__name__}: {e}") from e
        parts = {who: part for target, samples in by_target.items() for who, part in _by_process(target, samples).items()}
        return {who: samples for who, samples in parts.items() if any(s.name == PRESENCE for s in samples)}

    async def _get(self, url: str, parameters: Mapping[str, str], who: str) -> httpx.Response:
        try:
            answer = await self.client.get(url, params=dict(parameters))
        except (httpx.HTTPError, httpx.InvalidURL) as e:
            raise Missing(f"the load: {who} does not answer: {e or type(e).__name__}") from e
        if answer.status_code in (401, 403):
            raise Missing(f"the load: {who} wants other credentials ({answer.status_code}); set planner.metrics.token, or user and password")
        if answer.status_code != 200:
            raise Missing(f"the load: {who} answers {answer.status_code}: {answer.text[:200].strip()}")
        return answer


def _by_process(target: str, samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """One scrape may tell the series of several processes, each with a label of its own."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        process = sample.label("process")
        found.setdefault(f"{target} ({process})" if process else target, []).append(sample)
    return found


def _load(at: float, seconds: float, grown: Mapping[str, float], gauges: Mapping[str, float]) -> Load:
    def ratio(top: str, under: str) -> float | None:
        return grown.get(_P + top, 0.0) / count if (count := grown.get(_P + under, 0.0)) > 0 else None

    prompt = ratio("input_sequence_tokens_sum", "input_sequence_tokens_count")
    return Load(
        at, seconds, rate=grown.get(f"{_P}requests_started_total", 0.0) / seconds, prompt_tokens=prompt or 0.0,
        output_tokens=ratio("output_sequence_tokens_sum", "output_sequence_tokens_count") or 0.0,
        cached_share=ratio("cached_tokens_sum", "input_sequence_tokens_sum") or 0.0,
        in_progress=gauges[f"{_P}inflight_requests"], held=gauges[f"{_P}held_requests"],
        ttft=ratio("time_to_first_token_seconds_sum", "time_to_first_token_seconds_count"),
        itl=ratio("inter_token_latency_seconds_sum", "inter_token_latency_seconds_count"), prompt_spread=spread(grown, f"{_P}input_sequence_tokens"),
    )
