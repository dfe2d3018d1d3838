"""The life of one completion request, from its head to its last byte. Raw ASGI: request and response objects would cost more than all of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from dynamo_core.context import Context
from dynamo_core.errors import AllBusy, Cancelled, ModelNotFound, RequestError, StreamTimeout, Unavailable
from dynamo_core.frontend.body import LINGER, discard, read_body
from dynamo_core.frontend.contract import Reservation
from dynamo_core.frontend.deliver import stream, unary
from dynamo_core.frontend.exchange import Exchange
from dynamo_core.frontend.failure import Failure, Header
from dynamo_core.frontend.job import Job
from dynamo_core.frontend.parse import decode
from dynamo_core.frontend.respond import respond
from dynamo_core.frontend.servers.contract import DirectSend
from dynamo_core.frontend.service import Service
from dynamo_core.frontend.together import Together
from dynamo_core.pipeline.contract import Generation, Model

log = logging.getLogger("dynamo.frontend")

_LAST_WORDS = 5.0
"""Seconds in which a client must take the last frame of a stream that failed."""


class Family(Protocol):
    """One completion API: how its bodies are decoded, and what they ask for."""

    name: str
    """The label `endpoint` of metrics and access log."""
    surface: str
    """What a model card must offer."""
    decoder: msgspec.json.Decoder[Any]

    async def prepare(self, body: Any, model: Model, exchange: Exchange, *, direct_routing: bool) -> Job: ...


class Endpoint:
    """`POST` of one API family, as an ASGI application."""

    def __init__(self, service: Service, family: Family) -> None:
        self._service = service
        self._family = family

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(self._family.name, scope)
        service = self._service
        full = len(service.in_progress) >= service.config.max_requests
        service.admit(exchange)
        try:
            if full:
                raise AllBusy(f"one more request: {service.config.max_requests} are in progress, the limit of this server")
            await self._serve(exchange, receive, send)
        except asyncio.CancelledError:
            _note(exchange, Failure.of(Cancelled("the connection was closed"), exchange.request_id))
            raise
        except Exception as e:
            await _fail(exchange, e, receive, send)
        finally:
            service.finish(exchange)

    async def _serve(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        service = self._service
        exchange.check_numbers()
        if service.authenticator is not None and (principal := await service.authenticate(exchange.headers)) is not None:
            exchange.tenant, exchange.subject, exchange.account = principal.tenant or exchange.tenant, principal.subject, principal.tenant
        if service.limiter is not None:
            await service.limiter.admit(exchange.account)
        raw = await read_body(receive, limit=service.config.max_body_bytes, timeout=service.config.body_timeout)
        exchange.body_read = True
        body = decode(self._family.decoder, raw)
        del raw
        exchange.stream = bool(body.stream)
        model = self._find(body.model, exchange)
        service.metrics.begin(exchange)
        await self._generate(body, model, exchange, receive, send)

    def _find(self, name: str, exchange: Exchange) -> Model | None:
        """The model, or `None` when the request may wait for its first worker."""
        service = self._service
        try:
            model = self._suitable(service.catalog.get(name), name)
        except (Unavailable, ModelNotFound):
            known = service.holding.known(name) if service.holding is not None else None
            if known is None:
                raise
            exchange.model = known
            return None
        exchange.model = model.name
        return model

    def _suitable(self, model: Model, name: str) -> Model:
        if (surface := self._family.surface) not in model.card.surfaces:
            raise RequestError(f"model {name!r} does not answer {surface}; it offers {', '.join(model.card.surfaces)}", param="model")
        return model

    async def _wait(self, name: str) -> Model:
        assert self._service.holding is not None
        return self._suitable(await self._service.holding.wait(name), name)

    async def _begin(self, job: Job, context: Context) -> Generation:
        try:
            return await _start(job, context)
        except Unavailable:
            # The last worker may have left since the model was found, or all of them may have just failed.
            if self._service.holding is None or (job.model.not_ready() is None and job.model.lost() is None):
                raise
        await self._wait(job.model.name)
        return await _start(job, context)

    async def _generate(self, body: Any, model: Model | None, exchange: Exchange, receive: Receive, send: Send) -> None:
        """Under a time limit, and watched for a client that leaves."""
        service = self._service
        loop = asyncio.get_running_loop()
        deadline = exchange.arrived + service.config.request_timeout
        context = Context(
            exchange.unique_id,
            deadline=deadline,
            priority=exchange.priority or 0,
            session=exchange.session,
            tenant=exchange.tenant,
            traceparent=exchange.traceparent,
        )
        generation: Generation | None = None
        reservation: Reservation | None = None
        limit = asyncio.timeout_at(min(deadline, exchange.arrived + service.config.first_token_timeout))
        unwatch: Callable[[], object] | None = None

        def left() -> None:
            """Stop at once, whatever the request is waiting for."""
            if not exchange.finished:  # servers report the end of a complete answer in the same way
                exchange.left = True
                context.cancel("client disconnected")
                if not limit.expired():
                    limit.reschedule(loop.time() - 1)

        try:
            async with limit:
                unwatch = (send.watch(left) if isinstance(send, DirectSend) else None) or loop.create_task(_watch(receive, left)).cancel
                if model is None:
                    model = await self._wait(body.model)
                job = await self._family.prepare(body, model, exchange, direct_routing=service.config.direct_routing)
                if service.config.tenant_cache_salt and exchange.account is not None:
                    job.salt(exchange.account)
                hints = job.requests[0].hints
                context.priority, context.session = hints.priority, hints.session
                if job.dry_run:
                    await self._dry_run(job, exchange, context, send)
                    return
                if service.limiter is not None:
                    reservation = await service.limiter.reserve(exchange.account, job.longest)
                generation = await self._begin(job, context)
                first = await generation.read()
                exchange.first_token = time.monotonic()
                limit.reschedule(deadline)
                await (stream if exchange.stream else unary)(job, generation, first, exchange, service.metrics.itl_recorder(exchange.model), send)
        except TimeoutError:
            if not limit.expired():
                raise
            if context.cancelled:
                raise Cancelled(context.cancel_reason or "cancelled") from None
            raise _too_slow(exchange, service.config.request_timeout, service.config.first_token_timeout) from None
        finally:
            if unwatch is not None:
                unwatch()
            if generation is not None:
                exchange.usage, exchange.decisions, exchange.workers = generation.usage, list(generation.decisions), list(generation.workers)
            if reservation is not None:
                reservation.settle(exchange.usage.prompt_tokens + exchange.usage.completion_tokens)
            if not exchange.finished:
                context.cancel("request failed")
                if generation is not None:
                    generation.cancel(context.cancel_reason or "request failed")

    async def _dry_run(self, job: Job, exchange: Exchange, context: Context, send: Send) -> None:
        """Where the request would go: the answer is the decision record, and nothing is generated."""
        decision = await job.model.route(job.requests[0], context)
        exchange.decisions.append(decision)
        body = msgspec.json.encode(
            {
                "id": job.id,
                "object": "dynamo.decision",
                "created": int(time.time()),
                "model": job.body.model,
                "decision": decision,
                "prompt_tokens": len(job.requests[0].token_ids),
                "record": self._service.catalog.decision(decision),
            },
            enc_hook=str,
        )
        exchange.responding, exchange.status, exchange.finished = True, 200, True
        await respond(send, 200, body, [_id(exchange), (b"x-dynamo-decision", decision.encode("latin-1"))])


async def _start(job: Job, context: Context) -> Generation:
    if len(job.requests) == 1:
        return await job.model.start(job.requests[0], job.text, context)
    started: list[Generation] = []
    try:
        for request in job.requests:
            started.append(await job.model.start(request, job.text, context.fork()))
    except BaseException:
        for generation in started:
            generation.cancel("another prompt of the same request failed")
        raise
    return Together(started, job.requests[0].sampling.n)


async def _watch(receive: Receive, left: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    left()


def _too_slow(exchange: Exchange, request_timeout: float, first_token_timeout: float) -> StreamTimeout:
    if not exchange.first_token and first_token_timeout < request_timeout:
        return StreamTimeout(f"no token within {first_token_timeout:g} s (frontend.first_token_timeout)")
    return StreamTimeout(f"the answer was not complete after {request_timeout:g} s (frontend.request_timeout)")


async def _fail(exchange: Exchange, error: Exception, receive: Receive, send: Send) -> None:
    """Before the first byte an error is an HTTP status; after it, the last frame of the stream."""
    if exchange.finished:
        return
    failure = Failure.of(error, exchange.request_id)
    if failure.unexpected:
        log.error(
            "request failed unexpectedly", exc_info=error, extra={"request_id": exchange.request_id, "endpoint": exchange.endpoint, "model": exchange.model}
        )
    _note(exchange, failure)
    if exchange.left:
        return
    try:
        if exchange.responding:
            async with asyncio.timeout(_LAST_WORDS):
                await send({"type": "http.response.body", "body": b"data: " + failure.body + b"\n\ndata: [DONE]\n\n", "more_body": False})
        elif exchange.body_read or isinstance(error, Cancelled):
            await respond(send, failure.status, failure.body, [_id(exchange), *failure.headers])
        else:
            await _refuse_unread(exchange, failure, receive, send)
    except (OSError, TimeoutError):
        pass  # the client is gone, or takes nothing: there is nobody to tell


async def _refuse_unread(exchange: Exchange, failure: Failure, receive: Receive, send: Send) -> None:
    """Answer a request whose body is still arriving. The body is read on, into nothing: an unread one would block the connection for good."""
    rest = asyncio.ensure_future(discard(receive))
    try:
        await asyncio.wait((rest,), timeout=LINGER)
        await respond(send, failure.status, failure.body, [_id(exchange), *failure.headers])
    finally:
        rest.cancel()


def _note(exchange: Exchange, failure: Failure) -> None:
    exchange.status, exchange.error_type, exchange.error_code = failure.status, failure.error_type, failure.code


def _id(exchange: Exchange) -> Header:
    return b"x-request-id", exchange.request_id.encode("latin-1")
