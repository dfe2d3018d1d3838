"""The configuration file, as attrs classes. Defaults are written here and nowhere else.

    namespace = "dynamo"

    [discovery]
    use = "file"                      # `use` names the component; the other keys are its own options

    [frontend]
    port = 8000

    [router]
    use = "least-loaded"              # a preset, or a stack: filters, scorers, picker

    [[workers]]
    count = 2
    engine = { use = "llamacpp", slots = 4 }

A field of type `Use` is a choice of component. Its options are checked against the component's own attrs class when the
configuration is loaded, so that a mistake in a plugin's option is found at the same time as any other.
"""

# ruff: noqa: RUF009  (`choice` makes an attrs field)
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from attrs import validators as v

from dynamo_core.config.tree import Key, Origin


class Secret(str):
    """A value that is written as `file:/path` or `env:NAME`, and that is never printed.

    It is the string itself for whoever uses it; `repr` (and so every dataclass, log record and traceback that holds it) shows only
    where it came from.
    """

    reference: str

    def __new__(cls, value: str, reference: str = "") -> Secret:
        secret = super().__new__(cls, value)
        secret.reference = reference
        return secret

    def __repr__(self) -> str:
        return f"<secret {self.reference}>" if self.reference else "<secret>"



@attrs.frozen
class Use:
    """A component chosen by name, and its options as written."""

    name: str
    options: Mapping[str, Any] = attrs.field(factory=dict)
    where: str = attrs.field(default="", eq=False)
    """`path:line` of the table, for errors."""
    weight: float = 1.0
    """Of a scorer; everything else ignores it."""
    marks: Mapping[Key, Origin] = attrs.field(factory=dict, eq=False, repr=False)
    """Where each option was written, so that a late error has a place as well."""


def choice(kind: str, default: str | None = None, **options: Any) -> Any:
    """A field that chooses a component of `kind`."""
    if default is None:
        return attrs.field(default=None, metadata={"kind": kind})
    return attrs.field(factory=lambda: Use(default, options), metadata={"kind": kind})


def _positive(default: float) -> Any:
    """Seconds, also written as "500ms" or "10m"."""
    return attrs.field(default=default, validator=v.gt(0), metadata={"duration": True})


@attrs.frozen
class Tls:
    cert: Path
    """The certificate chain (PEM)."""
    key: Path
    """Its private key (PEM)."""
    client_ca: Path | None = None
    """With it, clients must present a certificate that it signed (mTLS)."""


@attrs.frozen
class Admin:
    """An address of its own for `/metrics` and `/debug`, which the public one then does not have."""

    host: str = "127.0.0.1"
    """The address to listen on; beyond loopback, set a key."""
    port: int = attrs.field(default=0, validator=[v.ge(0), v.le(65535)])
    """Of several processes, each takes the first free port from here on. 0: any free port, registered in discovery and logged."""
    key: Secret | None = None
    """Callers send it as `Authorization: Bearer KEY`; health stays open."""


@attrs.frozen
class Hold:
    """Requests for a model that has no worker now, or none that has not just failed, wait for one: a fleet that is scaled to zero is woken by them."""

    limit: int = attrs.field(default=100, validator=v.ge(1))
    """Requests that may wait, of all models; one more is answered 529."""
    max_wait: float = _positive(120.0)
    """Seconds after which a request that still waits is answered 503. `frontend.first_token_timeout` ends it as well."""
    retry_after: float = _positive(10.0)
    """Seconds after which such a client is told to ask again."""


def _schemes(settings: object, attribute: object, value: tuple[str, ...]) -> None:
    if unknown := sorted(set(value) - {"https", "http"}):
        raise ValueError(f"'schemes' may have 'https' and 'http', not {unknown[0]!r}")


def _url(settings: object, attribute: attrs.Attribute[str], value: str) -> None:
    if not re.fullmatch(r"https?://[^/\s]+\S*", value):
        raise ValueError(f"{attribute.name!r} must begin with http:// or https://, is {value!r}")


@attrs.frozen
class Media:
    """Images that requests name by URL, for models that see. Data URIs are always taken."""

    schemes: tuple[str, ...] = attrs.field(default=("https",), validator=_schemes)
    """What is fetched: `https`, and `http` if you add it; nothing when empty."""
    hosts: tuple[str, ...] = ()
    """Only from these hosts and what is below them; from any when empty."""
    allow_private: bool = False
    """Also from addresses that are not on the public internet, on any port. Whoever may send requests can then reach what this server can reach."""
    max_bytes: int = attrs.field(default=16 * 2**20, validator=v.ge(1024))
    """Of one image."""
    max_items: int = attrs.field(default=8, validator=v.ge(1))
    """Images in one request."""
    max_parallel: int = attrs.field(default=16, validator=v.ge(1))
    """Fetched at once; more wait."""
    timeout: float = _positive(10.0)
    """Seconds in which an image must be complete, redirects included."""


@attrs.frozen
class Frontend:
    host: str = "127.0.0.1"
    """The address to listen on; beyond loopback, set an authenticator."""
    port: int = attrs.field(default=8000, validator=[v.ge(0), v.le(65535)])
    """0 takes any free port."""
    processes: int = attrs.field(default=1, validator=[v.ge(1), v.le(64)])
    """More than one share the port (SO_REUSEPORT), each with its own router."""
    http_server: Use = choice("http_server", "hypercorn")
    """What runs the HTTP application."""
    authenticator: Use | None = choice("authenticator")
    """Who may call; everyone when unset."""
    rate_limiter: Use | None = choice("rate_limiter")
    """How much a caller may use; unlimited when unset."""
    routes: tuple[Use, ...] = attrs.field(default=(), metadata={"kind": "routes"})
    """More HTTP surface, tried after the built-in paths."""
    middleware: tuple[Use, ...] = attrs.field(default=(), metadata={"kind": "middleware"})
    """ASGI middleware around everything, the first one outermost."""
    tls: Tls | None = None
    """Serve HTTPS."""
    max_body_bytes: int = attrs.field(default=32 * 2**20, validator=v.ge(1024))
    """A larger request body is answered 413."""
    max_requests: int = attrs.field(default=10_000, validator=v.ge(1))
    """Requests in progress; one more is answered 529."""
    body_timeout: float = _positive(60.0)
    """Seconds in which a client must have sent its request body."""
    request_timeout: float = _positive(600.0)
    """Seconds from arrival to the end of the answer."""
    first_token_timeout: float = _positive(300.0)
    """Seconds from arrival to the first token."""
    hold: Hold | None = None
    """Hold requests for known models that have no worker; without this table they are answered 503 at once."""
    drain_timeout: float = _positive(30.0)
    """Seconds that requests in progress have to end at shutdown."""
    direct_routing: bool = True
    """Clients may pin a request to an instance."""
    tenant_cache_salt: bool = False
    """Requests share cached KV blocks only with those of the same tenant (that an authenticator names): nobody can time what others have asked."""
    tenant_labels: int = attrs.field(default=100, validator=v.ge(0))
    """So many tenants have a label of their own in metrics; the others are `other`."""
    debug_routes: bool = True
    """`/debug/...`: decisions, workers, configuration. No prompts and no secrets."""
    media: Media = attrs.field(factory=Media)
    """What images are taken from where."""
    admin: Admin | None = None
    """Takes `/metrics` and `/debug` away from the public address."""


@attrs.frozen
class Status:
    """The status endpoint of roles without an HTTP surface of their own: /health /live /metrics."""

    host: str = "127.0.0.1"
    """The address to listen on."""
    port: int = attrs.field(default=0, validator=[v.ge(0), v.le(65535)])
    """0: any free port (it is registered in discovery and logged)."""
    enabled: bool = True
    """Turn it off where nothing asks for it."""


@attrs.frozen
class Worker:
    engine: Use = choice("engine", "echo")
    """What generates."""
    name: str = attrs.field(default="backend", validator=v.matches_re(r"[a-z0-9][a-z0-9_-]*"))
    """The component name in `namespace.component.endpoint`."""
    namespace: str | None = attrs.field(default=None, validator=v.optional(v.matches_re(r"[a-z0-9][a-z0-9_-]*")))
    """Instead of the namespace of the file: a pool behind a global router, which this file's frontend does not see."""
    count: int = attrs.field(default=1, validator=v.ge(0))
    """How many of it there are: processes that `dynamo up` starts, or workers inside one."""
    inside: bool = False
    """The process that routes (`dynamo frontend`, `dynamo router`) runs it, instead of a process of its own: for engines that compute nothing there, such as
    `openai` and `echo`. What an engine computes in Python or does wrong would hold up, or end, every stream."""
    role: str | None = attrs.field(default=None, validator=v.optional(v.in_(["aggregated", "prefill", "decode", "encode"])))
    """Instead of the role that the engine's card names."""
    served_name: str | None = None
    """The model name that clients use, instead of the engine's own."""
    max_requests: int = attrs.field(default=1024, validator=v.ge(1))
    """Requests in progress on one worker; one more gets a migratable overload error."""
    drain_timeout: float = _positive(30.0)
    """Seconds that requests in progress have to end at shutdown."""
    canary_interval: float = _positive(10.0)
    """Seconds of silence after which the engine is probed."""
    canary_timeout: float = _positive(10.0)
    """Seconds that a probe may take before the engine counts as dead."""


@attrs.frozen
class QueueClass:
    """A class of requests with a share of its own. Requests belong to the class that they name (`policy_class`), or to the first that fits their size."""

    name: str = attrs.field(validator=v.matches_re(r"[A-Za-z0-9_.-]+"))
    """What requests call it."""
    share: float = attrs.field(default=1.0, validator=v.gt(0))
    """Of what the queue lets go while several classes wait, in uncached prompt tokens."""
    up_to: int | None = attrs.field(default=None, validator=v.optional(v.ge(1)))
    """Requests that name no class and have at most this many uncached prompt tokens are of this class."""
    limit: int | None = attrs.field(default=None, validator=v.optional(v.ge(0)))
    """Requests of the class that may wait; one more is answered 529."""
    token_limit: int | None = attrs.field(default=None, validator=v.optional(v.ge(0)))
    """Prompt tokens of the class that may wait."""
    order: str | None = attrs.field(default=None, validator=v.optional(v.in_(["fcfs", "shortest"])))
    """Instead of that of the queue."""


@attrs.frozen
class Queue:
    """Where requests wait while no worker has room for them, so that what comes later can still be placed better, or go first."""

    enabled: bool = True
    """Off: requests are sent at once, whatever a policy brings along."""
    prefill_tokens: int | None = attrs.field(default=None, validator=v.optional(v.ge(0)))
    """A worker has room for a request while it has nothing to prefill, or with the request at most so many uncached prompt tokens."""
    prefill_share: float | None = attrs.field(default=None, validator=v.optional(v.gt(0)))
    """The same, as a share of the tokens that its engine takes in one step (`max_batched_tokens` of its card)."""
    wait_for: str = attrs.field(default="any", validator=v.in_(["any", "best"]))
    """`any`: requests wait until some worker has room. `best`: until the one that the stack would choose has."""
    order: str = attrs.field(default="fcfs", validator=v.in_(["fcfs", "shortest"]))
    """`shortest`: the least uncached tokens first, which ageing corrects."""
    ageing: float = attrs.field(default=20_000.0, validator=v.ge(0))
    """Tokens by which a request counts as shorter for each second that it waits; 0 lets long ones wait for ever."""
    longest_first: float = attrs.field(default=0.0, validator=[v.ge(0), v.le(0.5)])
    """This share of the requests, the longest, goes before all others in the order `shortest`: it bounds the slowest answers."""
    limit: int = attrs.field(default=1024, validator=v.ge(0))
    """Requests that may wait; one more is answered 529."""
    max_wait: float = _positive(120.0)
    """Seconds after which a request that still waits is answered 529."""
    lookahead: int = attrs.field(default=8, validator=v.ge(1))
    """How many requests that cannot go are looked at before the queue waits for something to happen."""
    classes: tuple[QueueClass, ...] = ()
    """Classes with shares; without any, all requests are alike."""


@attrs.frozen
class Router:
    """A preset (`use`) or a stack. A role's table (`[router.prefill]`) replaces the whole table for that role."""

    use: Use | None = choice("policy")
    """A policy by name."""
    filters: tuple[Use, ...] = attrs.field(default=(), metadata={"kind": "filter"})
    """Which workers must not serve a request; in addition to those of the policy."""
    scorers: tuple[Use, ...] = attrs.field(default=(), metadata={"kind": "scorer", "reserved": ("weight",)})
    """Each may carry a `weight` (1.0), beside its own options."""
    picker: Use | None = choice("picker")
    """How a worker is chosen from the totals."""
    temperature: float | None = attrs.field(default=None, validator=v.optional(v.ge(0)))
    """Shorthand: `picker = { use = "softmax", temperature = ... }`."""
    facts: tuple[Use, ...] = attrs.field(default=(), metadata={"kind": "facts"})
    """Options of fact providers; those that a stack needs are added by themselves."""
    queue: Queue | None = None
    """Hold requests back while no worker has room; a policy may bring a queue, which this table replaces."""
    seed: int | None = None
    """Of ties and chance: the same seed and the same requests give the same decisions. Several processes of one frontend draw apart. Without one each process
    draws its own, so that routers of one fleet do not all break ties for the same worker; records hold what was drawn, and replay exactly."""
    decisions: int = attrs.field(default=4096, validator=v.ge(0))
    """How many decision records to keep."""
    sync: bool = True
    """Frontends tell each other what they have sent, so that they do not all choose the same worker."""
    record: Path | None = None
    """Write every decision to this file, as JSON lines without prompts, for `dynamo replay`."""
    record_bytes: int = attrs.field(default=64 * 2**20, validator=v.ge(4096))
    """Size at which the file is put aside as `.1`; two are kept."""
    shadow: Router | None = None
    """A stack that decides along and is only compared; its queue, shadow and role tables mean nothing."""
    shadow_share: float = attrs.field(default=1.0, validator=[v.ge(0), v.le(1)])
    """Share of the decisions that it sees."""
    shadow_budget: float = attrs.field(default=0.01, validator=[v.gt(0), v.le(1)])
    """Share of a CPU that it may use; beyond it, it is stopped."""
    prefill: Router | None = None
    """For prefill workers, instead of this table."""
    decode: Router | None = None
    """For decode workers, instead of this table."""
    encode: Router | None = None
    """For encode workers, instead of this table."""


@attrs.frozen
class Migration:
    limit: int = attrs.field(default=3, validator=v.ge(0))
    """How often one request may move to another worker; 0 turns migration off."""
    wait: float = attrs.field(default=15.0, validator=v.ge(0), metadata={"duration": True})
    """Seconds to wait for a replacement when no other worker is there."""
    inhibit: float = _positive(5.0)
    """Seconds for which a worker that failed a request is avoided."""


@attrs.frozen
class Disaggregation:
    """For models that have prefill and decode workers."""

    fallback: bool = True
    """Decode workers read a prompt themselves when no prefill worker can; otherwise the request fails."""
    min_prompt: int = attrs.field(default=0, validator=v.ge(0))
    """Prompts with fewer tokens than this outside the decode worker's cache stay there: handing them over costs more than computing them."""


@attrs.frozen
class Kv:
    secret: Secret | None = None
    """Seeds the names of KV blocks, the same for the whole fleet. Unset: the first process makes one and leaves it in the discovery store."""


@attrs.frozen
class Observability:
    log_level: str = attrs.field(default="info", validator=v.in_(["debug", "info", "warning", "error"]))
    """Less important lines are not logged."""
    log_format: str = attrs.field(default="auto", validator=v.in_(["auto", "console", "json"]))
    """`auto`: console on a terminal, JSON otherwise."""
    otlp_endpoint: str | None = attrs.field(default=None, validator=v.optional(_url))
    """Traces go here by OTLP over HTTP: a collector (`http://otel:4318`), or the whole URL. Off when unset."""
    trace_ratio: float = attrs.field(default=1.0, validator=[v.ge(0), v.le(1)])
    """Share of the requests that are traced, unless the caller decides."""


@attrs.frozen
class PluginSettings:
    disabled: tuple[str, ...] = ()
    """Entry point or distribution names."""


@attrs.frozen
class Config:
    namespace: str = attrs.field(default="dynamo", validator=v.matches_re(r"[a-z0-9][a-z0-9_-]*"))
    """Processes see only those of the same namespace."""
    host: str = "127.0.0.1"
    """The address under which the other machines of the fleet reach this one."""
    lease_ttl: float = _positive(10.0)
    """Seconds after which a silent process counts as gone."""
    discovery: Use = choice("discovery", "file")
    """Where processes find each other."""
    request_plane: Use = choice("request_plane", "tcp")
    """How requests travel."""
    event_plane: Use = choice("event_plane", "zmq")
    """How news of caches and load travels."""
    frontend: Frontend = attrs.field(factory=Frontend)
    """The HTTP side."""
    router: Router = attrs.field(factory=Router)
    """Who serves a request."""
    around: tuple[Use, ...] = attrs.field(default=(), metadata={"kind": "preprocessor"})
    """Wrappers around every request, between the API and the router, the first one outermost: guardrails, audit, tenancy."""
    migration: Migration = attrs.field(factory=Migration)
    """What happens when a worker is lost."""
    disaggregation: Disaggregation = attrs.field(factory=Disaggregation)
    """How prompts travel between prefill and decode workers."""
    workers: tuple[Worker, ...] = ()
    """The engines that `dynamo up` starts, or that run inside the process that routes."""
    planner: Use | None = choice("planner")
    """What decides how many workers there are, for `dynamo planner run`."""
    status: Status = attrs.field(factory=Status)
    """The status endpoint of roles without HTTP."""
    kv: Kv = attrs.field(factory=Kv)
    """How workers report what is in their KV caches."""
    observability: Observability = attrs.field(factory=Observability)
    """Logs and traces."""
    plugins: PluginSettings = attrs.field(factory=PluginSettings)
    """Which plugins are used."""
