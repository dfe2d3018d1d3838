"""The router's queue for requests that are on their way: a coroutine that returns once the request has a worker."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dynamo_core.config.schema import Queue
from dynamo_core.context import Context
from dynamo_core.errors import Cancelled
from dynamo_core.routing.contract import RoutingRequest
from dynamo_core.routing.queue import RouterQueue, Ticket
from dynamo_core.routing.record import Decision
from dynamo_core.routing.router import Router

TICK = 0.25
"""Seconds between two looks at the queue while nothing happens: inhibitions end and patience runs out without an event."""
NONE = Queue()
"""What a queue that was turned off leaves to those who wait: no bounds, so that all go who can be taken."""


class WaitingRoom:
    """One for each router that has, or had, a queue; the settings are those of the router's stack. Close it when the router ends."""

    def __init__(self, router: Router, metrics: QueueMetrics | None = None) -> None:
        self.queue = RouterQueue(router, router.stack.queue or NONE, metrics)
        self._router = router
        self._metrics = metrics
        self._due: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def place(self, asked: RoutingRequest, context: Context) -> Decision:
        """A decision that is booked.

        :raises AllBusy: the queue is full, or patience ran out. :raises NoWorker: nobody can take it. :raises Cancelled: the caller left.
        """
        loop = asyncio.get_running_loop()
        settled: asyncio.Future[None] = loop.create_future()

        def wake(_: object = None) -> None:
            if not settled.done():
                settled.set_result(None)

        self._follow()
        ticket = self.queue.submit(asked, wake)
        if ticket.waiting:
            self._watch()
            forget = context.on_cancel(wake)
            try:
                async with asyncio.timeout(context.remaining()):
                    await settled
            except TimeoutError:
                # The deadline is the caller's affair: what it does then, it does everywhere.
                context.cancel("deadline")
            except BaseException:
                self._give_back(ticket)
                raise
            finally:
                forget()
            self._count()
        if context.cancelled:
            self._give_back(ticket)
            raise Cancelled(context.cancel_reason or "cancelled")
        if ticket.error is not None:
            raise ticket.error
        assert ticket.decision is not None, "settled without error"
        return ticket.decision

    def changed(self) -> None:
        """Room may have been made. The queue is looked at once for all that happens in one turn of the loop."""
        if len(self.queue) and self._due is None:
            self.queue.changed()
            self._due = asyncio.get_running_loop().call_soon(self._look)

    def close(self) -> None:
        self.queue.refuse_all("the router ends")
        for handle in (self._due, self._timer):
            if handle is not None:
                handle.cancel()

    def _follow(self) -> None:
        """A reload changes the settings for those who wait as well: nobody is overtaken because he came before it."""
        settings = self._router.stack.queue or NONE
        if settings is not self.queue.settings:
            if self._metrics is not None:
                self._metrics.length(dict.fromkeys(self.queue.waiting(), 0))
            self.queue.follow(settings)
            self._count()

    def _look(self) -> None:
        self._due = None
        self._follow()
        self.queue.release()
        self._count()

    def _watch(self) -> None:
        self._count()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if len(self.queue):
            self.queue.changed()
            self._look()
            self._watch()

    def _give_back(self, ticket: Ticket) -> None:
        """The request will not be sent: free its place, or the booking that it was just given."""
        if ticket.decision is not None and ticket.decision.worker is not None:
            ticket.decision.outcome = "cancelled"
            self._router.finished(ticket.request.id, ticket.decision.worker, "cancelled")
        self.queue.cancel(ticket)
        self._count()

    def _count(self) -> None:
        if self._metrics is not None:
            self._metrics.length(self.queue.waiting())


class QueueFamilies:
    """The metric families of queues."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.seconds = Histogram("dynamo_router_queue_seconds", "Time in the router's queue; 0 for requests that did not have to wait.", ["model", "class"],
                                 buckets=(.001, .005, .01, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 120), registry=registry)
        self.waiting = Gauge("dynamo_router_queue_waiting", "Requests in the router's queue.", ["model", "class"],
                             registry=registry)
        self.turned_away = Counter("dynamo_router_queue_turned_away", "Requests that were refused at the queue or in it, by cause.",
                                   ["model", "class", "cause"], registry=registry)


class QueueMetrics:
    """Implements `routing.queue.QueueObserver` for one queue of a model, which has one for each role."""

    def __init__(self, families: QueueFamilies, model: str) -> None:
        self._families = families
        self._model = model
        self._counted: dict[str, int] = {}

    def waited(self, ticket: Ticket, seconds: float) -> None:
        self._families.seconds.labels(self._model, ticket.of).observe(seconds)

    def turned_away(self, of: str, why: str) -> None:
        self._families.turned_away.labels(self._model, of, why).inc()

    def length(self, waiting: dict[str, int]) -> None:
        for of, count in waiting.items():
            self._families.waiting.labels(self._model, of).inc(count - self._counted.get(of, 0))
            self._counted[of] = count
