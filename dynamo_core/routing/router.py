"""One router: for one model and role it joins providers, stack, dice and ring, and decides.

Everything here is synchronous and belongs to one event loop. A provider that breaks is left out, with those policies that
need its facts; requests go on.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import msgspec

from dynamo_core.cards import Role
from dynamo_core.errors import AllBusy, NoWorker
from dynamo_core.routing.bookings import Bookings
from dynamo_core.routing.contract import Dice, Fact, FollowsDecisions, RoutingRequest, Worker
from dynamo_core.routing.decide import Choice, Stack, blamed
from dynamo_core.routing.patience import Patience
from dynamo_core.routing.record import Decision
from dynamo_core.routing.ring import Ring
from dynamo_core.routing.sources import Observer
from dynamo_core.types import Hints

_MASK = 0xFFFFFFFFFFFFFFFF


@attrs.frozen(eq=False)
class Weighed:
    """A decision that was not taken yet."""

    request: RoutingRequest
    """Without the prompt and the cache salt."""
    columns: Mapping[Fact[Any], Sequence[Any]]
    choice: Choice
    workers: Sequence[Worker]
    labels: Sequence[str]
    seed: int
    started: float


class Router(Bookings):
    """Decides for one (model, role), by what it is told of the fleet (`Roster`) and of requests (`Bookings`).

    :param clock: seconds, for inhibition and the age of facts; :param wall: Unix time, for records. Virtual time replaces both.
    """

    def __init__(
        self, model: str, stack: Stack, *, role: Role = "aggregated", seed: int = 0, decisions: int = 4096, ring: Ring | None = None,
        observer: Observer | None = None, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(model, observer=observer, clock=clock)
        self.role: Role = role
        self.ring = Ring(decisions) if ring is None else ring
        self.generation = 0
        self.patience = Patience()
        self._wall = wall
        self._seed = seed
        self._decided = 0
        self._recorded = 0
        self._prefix = secrets.token_hex(4)
        self.swap(stack)

    def swap(self, stack: Stack) -> None:
        """Decide by `stack` from now on. Providers that it has in common with the present one keep their state; new ones are told of the present."""
        self.replace(stack.providers)
        self.stack = stack
        self.generation += 1
        self._busy = frozenset(part.name for part in stack.filters if part.busy)
        self._follow_decisions = self._those(FollowsDecisions)
        self._changed()

    # -------------------------------------------------------------- deciding

    def route(self, request: RoutingRequest) -> Decision:
        """Choose a worker. The caller books it (`booked`) before anything else is routed, and sets `dispatched` on the record.

        :raises AllBusy: every worker that could take the request is at its limit. :raises NoWorker: nobody can take it.
        """
        return self.settle(self.weigh(request))

    def dry_run(self, request: RoutingRequest) -> Decision:
        """What `route` would decide now. It is recorded, and changes nothing else; never raises for want of workers."""
        return self._record(self.weigh(request), dry_run=True)

    def weigh(self, request: RoutingRequest) -> Weighed:
        """What `route` would decide now, neither recorded nor told to anybody. `settle` makes it the decision, if that comes before anything else."""
        started = time.perf_counter()
        columns = self._columns(request)
        seed = self._seed_of(self._decided)
        tokens = request.prompt_tokens or len(request.token_ids)
        bare = RoutingRequest(
            request.id, request.model, (), tokens, self.role, _sealed(request.hints), request.adapter, None, request.max_tokens, request.failed, (),
            request.tenant,
        )
        now = self._clock()
        slow = self.patience.left_out(now)
        spent: dict[str, float] = {}
        choice = self.stack.decide(bare, self._workers, columns, Dice(seed), slow, spent)
        choice.faults += slow.items()
        self.patience.note(spent, now)
        return Weighed(bare, columns, choice, self._workers, self._labels, seed, started)

    def settle(self, weighed: Weighed, waited: float = 0.0) -> Decision:
        """Make it the decision. :param waited: seconds that the request spent in a queue before. :raises AllBusy: and :raises NoWorker: as `route` does."""
        decision = self._record(weighed, dry_run=False, waited=waited)
        self._decided += 1
        if decision.worker is None:
            raise self._refusal(decision)
        for part in self._follow_decisions:
            try:
                part.component.chosen(decision.request, decision.worker)
            except BaseException as e:
                self._fault(part.name, blamed(e))
        return decision

    def _record(self, weighed: Weighed, *, dry_run: bool, waited: float = 0.0) -> Decision:
        choice = weighed.choice
        self._recorded += 1
        decision = Decision(
            f"{self._prefix}-{self._recorded:x}", weighed.request, choice.worker, weighed.workers, weighed.labels, weighed.columns, choice.rejected,
            choice.candidates, choice.scores, choice.totals, choice.faults, weighed.seed, self.stack.hash, self.generation, self._wall(), dry_run,
            waited=waited,
        )
        for policy, what in choice.faults:
            self._fault(policy, what)
        self.ring.push(decision)
        self.observer.decided(decision, time.perf_counter() - weighed.started)
        return decision

    def all_busy(self, weighed: Weighed) -> bool:
        """Whether nobody could take it, and for want of capacity alone or in part."""
        return weighed.choice.worker is None and any(by in self._busy for _, by, _ in weighed.choice.rejected)

    def _seed_of(self, decision: int) -> int:
        return Dice((self._seed << 32) ^ decision).below(_MASK + 1)

    def _refusal(self, decision: Decision) -> NoWorker:
        what = f"model {self.model!r}" + (f" ({self.role})" if self.role != "aggregated" else "")
        now = self._clock()
        busy = any(by in self._busy for _, by, _ in decision.rejected) or any(m.busy and m.inhibited_until > now for m in self._members.values())
        return (AllBusy if busy else NoWorker)(what, decision.reasons() or ["no worker is registered"])


class _Sealed(dict[str, float]):
    """For policies, which must not write to what others see after them."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("hints are for reading")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]


def _sealed(hints: Hints) -> Hints:
    """The same hints, without anything in them that could be changed for others."""
    taints = hints.preferred_taints
    return msgspec.structs.replace(hints, preferred_taints=_Sealed(taints) if taints else {})
