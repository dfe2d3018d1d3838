"""Every error that the framework raises, on one screen.

    DynamoError
    ├── ConfigError           the operator's fault: exit code 2, every problem at once, no traceback
    ├── PluginError           a plugin's fault: always names it
    │   └── UndeclaredFact    a policy read a fact that it did not declare
    ├── RequestError          the client's fault: an OpenAI-shaped 4xx
    │   ├── ModelNotFound     404
    │   ├── RequestNotFound   404, no request of that id is under way
    │   ├── IdInUse           409, another request of that id is under way
    │   ├── PromptTooLong     400
    │   ├── BodyTooLarge      413
    │   ├── BodyTooSlow       408
    │   ├── Unauthorized      401
    │   ├── Forbidden         403
    │   └── RateLimited       429
    │       └── QuotaExceeded 429, and asking again will not help
    ├── Unavailable           nobody's fault: 503 with Retry-After
    │   ├── CannotPair        503, a prefill and a decode worker cannot hand KV blocks over
    │   ├── NoWorker          503, no worker can take the request
    │   └── AllBusy           529, every worker is over its limit
    ├── Cancelled             499, the caller went away
    ├── StoreUnavailable      the discovery store does not answer
    ├── LeaseLost             our registration expired
    ├── ScaleRefused          so many replicas cannot be had, and asking again will not help
    ├── ConnectorUnavailable  whoever starts and stops replicas does not answer, or did not confirm
    └── StreamError           the stream between caller and worker ended badly
        ├── CannotConnect     migratable
        ├── Disconnected      migratable
        ├── StreamTimeout     migratable
        ├── WorkerOverloaded  migratable: this worker is at capacity
        ├── WorkerDraining    migratable: this worker is leaving
        ├── EngineDead        migratable: the engine behind this worker died
        ├── PeerLost          migratable: the worker that has the other half of this request is gone
        ├── EngineFailed      not migratable: the engine refused or broke on this very request
        ├── EndpointNotFound  not migratable: nobody serves that name there
        └── ProtocolViolation not migratable: the peer sent what the protocol forbids

A migratable error says that another worker may well succeed with the same request. `code` is what travels on the
wire and stands in metrics labels; `from_wire` turns it back into the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import attrs


class DynamoError(Exception):
    """Base of every error that this framework raises on purpose."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    migratable: ClassVar[bool] = False


# ------------------------------------------------------------------ the operator


@attrs.frozen
class Problem:
    """One thing that is wrong with the configuration: where, what, because; remedy."""

    what: str
    where: str = ""
    """`path:line`, an environment variable or a command-line option."""
    source: str = ""
    """The offending line as written."""
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.source:
            number = self.where.rpartition(":")[2]
            text += f"\n  {number if number.isdigit() else '':>4} | {self.source.strip()}"
        if self.remedy:
            text += f"\n  hint: {self.remedy}"
        return text


class ConfigError(DynamoError):
    """The configuration cannot be used; the text tells the operator what to do."""

    code = "config"

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n\n".join(map(str, problems)))


# ------------------------------------------------------------------ plugins


class PluginError(DynamoError):
    """A plugin broke its contract. `plugin` names the distribution or the component."""

    code = "plugin"

    def __init__(self, plugin: str, message: str) -> None:
        self.plugin = plugin
        super().__init__(f"{plugin}: {message}")


class UndeclaredFact(PluginError):
    """A policy read a fact that it had not declared, so nobody promised to provide it."""

    code = "undeclared_fact"

    def __init__(self, policy: str, fact: str) -> None:
        self.fact = fact
        super().__init__(policy, f"read fact {fact!r} without listing it in `needs`")


# ------------------------------------------------------------------ the client


class RequestError(DynamoError):
    """The request cannot be served as it stands. `param` names the offending field."""

    code = "invalid_request"
    status = 400
    kind: ClassVar[str] = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class ModelNotFound(RequestError):
    code = "model_not_found"
    status = 404


class RequestNotFound(RequestError):
    code = "request_not_found"
    status = 404


class IdInUse(RequestError):
    code = "id_in_use"
    status = 409


class PromptTooLong(RequestError):
    code = "context_length_exceeded"


class BodyTooLarge(RequestError):
    code = "body_too_large"
    status = 413


class BodyTooSlow(RequestError):
    code = "body_timeout"
    status = 408


class Unauthorized(RequestError):
    code = "invalid_api_key"
    status = 401
    kind = "authentication_error"


class Forbidden(RequestError):
    code = "permission_denied"
    status = 403
    kind = "permission_error"


class RateLimited(RequestError):
    """The caller has used up what it may use for now; `retry_after` is in seconds."""

    code = "rate_limit_exceeded"
    status = 429
    kind = "rate_limit_error"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class QuotaExceeded(RateLimited):
    """More than the caller may ever use at once: asking again gives the same answer."""

    code = "insufficient_quota"
    kind = "insufficient_quota"


# ------------------------------------------------------------------ nobody


class Unavailable(DynamoError):
    """The fleet cannot serve this now; trying again later may help. `retry_after` is in seconds."""

    code = "unavailable"
    status = 503
    kind: ClassVar[str] = "service_unavailable"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class CannotPair(Unavailable):
    """A prefill and a decode worker of one model do not agree on what the hand-over of KV blocks needs."""

    code = "cannot_pair"


class NoWorker(Unavailable):
    """No worker can take the request; `reasons` says why, worker by worker (at most a few)."""

    code = "no_worker"

    def __init__(self, what: str, reasons: Sequence[str] = (), *, retry_after: float = 1.0) -> None:
        text = f"no worker can take {what}"
        if reasons:
            text += ": " + "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
        super().__init__(text, retry_after=retry_after)


class AllBusy(NoWorker):
    code = "overloaded"
    status = 529
    kind = "overloaded_error"


class Cancelled(DynamoError):
    """The caller went away or asked to stop."""

    code = "cancelled"
    status = 499


class StoreUnavailable(DynamoError):
    """The discovery store does not answer; what is known stays in use."""

    code = "store_unavailable"
    status = 503


class LeaseLost(DynamoError):
    """Our lease expired or was revoked: everything registered under it is gone."""

    code = "lease_lost"


class ScaleRefused(DynamoError):
    """The targets cannot be had: an unknown role, no room, somebody else's decision. Nothing was changed."""

    code = "scale_refused"
    status = 409


class ConnectorUnavailable(DynamoError):
    """Whoever starts and stops replicas does not answer, or did not confirm: what runs is unknown, so ask again later."""

    code = "connector_unavailable"
    status = 503


# ------------------------------------------------------------------ the stream


class StreamError(DynamoError):
    """The stream between the caller and a worker ended before its end."""

    code = "stream"
    status = 502


class CannotConnect(StreamError):
    code = "cannot_connect"
    migratable = True


class Disconnected(StreamError):
    code = "disconnected"
    migratable = True


class StreamTimeout(StreamError):
    code = "stream_timeout"
    status = 504
    migratable = True


class WorkerOverloaded(StreamError):
    code = "worker_overloaded"
    status = 529
    migratable = True


class WorkerDraining(StreamError):
    code = "worker_draining"
    status = 503
    migratable = True


class EngineDead(StreamError):
    code = "engine_dead"
    status = 503
    migratable = True


class PeerLost(StreamError):
    """Said by a healthy worker: prefill for decode, or the other way round."""

    code = "peer_lost"
    status = 503
    migratable = True


class EngineFailed(StreamError):
    code = "engine_failed"
    status = 500


class EndpointNotFound(StreamError):
    code = "endpoint_not_found"
    status = 404


class ProtocolViolation(StreamError):
    code = "protocol_violation"


def _subclasses(of: type[DynamoError]) -> list[type[DynamoError]]:
    return [of, *(deep for cls in of.__subclasses__() for deep in _subclasses(cls))]


def to_wire(error: BaseException) -> tuple[str, str]:
    """`(code, message)` to send to the peer. What we did not raise on purpose stays in our own log."""
    if isinstance(error, DynamoError):
        return error.code, str(error)
    return EngineFailed.code, f"the worker failed ({type(error).__name__}); its log has the details"


def from_wire(code: str, message: str) -> DynamoError:
    """The error that `to_wire` described; an unknown code becomes `EngineFailed`."""
    cls = _BY_CODE.get(code, EngineFailed)
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    for name, default in (("param", None), ("retry_after", 1.0), ("plugin", ""), ("fact", ""), ("problems", ())):
        setattr(error, name, default)
    return error


_BY_CODE: dict[str, type[DynamoError]] = {cls.code: cls for cls in _subclasses(DynamoError)}
