"""Where the planner scales in Kubernetes: reads what runs of each role, and writes how many there should be."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping

import attrs
from attrs import validators as v

from dynamo_core.errors import ConfigError, ConnectorUnavailable, Problem, ScaleRefused
from dynamo_core.scaling import ROLES, RoleState
from dynamo_kubernetes.api import CONFLICT, INVALID, NOT_FOUND, Kube, Refused, Unreachable
from dynamo_kubernetes.connection import Connection, seconds
from dynamo_kubernetes.graph import Graph
from dynamo_kubernetes.others import Others
from dynamo_kubernetes.records import now
from dynamo_kubernetes.replicas import Counter
from dynamo_kubernetes.sets import Sets
from dynamo_kubernetes.workloads import MANAGER, Dial, Source, Workload, writes

log = logging.getLogger("dynamo.kubernetes")

_TRIES = 20
"""Attempts at a write that somebody else's keep colliding with."""
_LOOKS = (0.05, 1.0)
"""Seconds between two looks at what the platform makes of a write: the first, and the longest."""


@attrs.define(eq=False)
class KubernetesConnector(Connection):
    """Options of `connector = { use = "kubernetes" }`. Workers go on when it is closed: they belong to the cluster."""

    graph: str | None = None
    """The DynamoGraphDeployment whose components are scaled, through their scaling adapters where these exist."""
    selector: str | None = None
    """Instead: labels of the Deployments and LeaderWorkerSets that are scaled, as `app=chat`."""
    role_label: str = "dynamo/role"
    """The label by which those say their role."""
    components: Mapping[str, str] = attrs.field(factory=dict, validator=v.deep_mapping(v.in_(ROLES), v.instance_of(str)))
    """Component of the graph, by role, where their types do not tell."""
    gpus: Mapping[str, int] = attrs.field(factory=dict, validator=v.deep_mapping(v.in_(ROLES), v.ge(0)))
    """GPUs of one replica, by role, instead of what the resource limits of its pods say."""
    graph_version: str = attrs.field(default="v1beta1", validator=v.matches_re(r"v\d+((alpha|beta)\d+)?"))
    """Of the API group nvidia.com."""
    stuck_after: float = seconds(60.0)
    """Seconds after which a pod that cannot be scheduled or started counts as one that never will."""
    verify_timeout: float = seconds(15.0)
    """Seconds in which the platform must have taken over what was written; also how long a rolling update is waited for."""
    wait_stable: float = attrs.field(default=0.0, validator=v.ge(0), metadata={"duration": True})
    """Seconds for which a change waits until everything is ready and stable. 0: it does not; the planner looks again by itself."""
    yield_for: float = attrs.field(default=60.0, validator=v.ge(0), metadata={"duration": True})
    """Seconds for which a role is left alone after somebody else has changed it."""

    _kube: Kube | None = attrs.field(init=False, default=None, repr=False)
    _source: Source = attrs.field(init=False, default=None, repr=False)
    _counter: Counter = attrs.field(init=False, default=None, repr=False)
    _others: Others = attrs.field(init=False, default=None, repr=False)
    _lock: asyncio.Lock = attrs.field(init=False, factory=asyncio.Lock, repr=False)

    # ------------------------------------------------------------------ the contract

    async def start(self) -> None:
        if (self.graph is None) == (self.selector is None):
            raise ConfigError(Problem("the connector needs to know what to scale", remedy="set one of `graph` and `selector`"))
        if self.graph is not None:
            self._source = Graph(self.graph, self.graph_version, self.components, self.gpus)
        else:
            self._source = Sets(self.selector or "", self.role_label, self.gpus)
        self._counter, self._others = Counter(self.stuck_after), Others(self.yield_for)
        kube = self.kube()
        await kube.__aenter__()
        try:
            self._others.notice(await self._source.read(kube))
        except BaseException as e:
            await kube.__aexit__()
            if isinstance(e, Refused):
                raise ConfigError(Problem(f"the API server at {kube.server} refuses the planner: {e}",
                                          remedy="bind the planner's role of deploy/ to its service account")) from e
            if isinstance(e, LookupError):
                raise ConfigError(Problem(str(e.args[0]))) from e
            if isinstance(e, Unreachable):
                raise ConnectorUnavailable(str(e)) from e
            raise
        self._kube = kube

    async def observe(self) -> Mapping[str, RoleState]:
        async with self._lock:
            workloads = await self._read()
            self._others.notice(workloads)
            return await self._states(workloads)

    async def scale(self, targets: Mapping[str, int], *, reason: str) -> None:
        # A change of two roles is made whole even if the caller goes away between them.
        changing = asyncio.create_task(self._scale(dict(targets), reason), name="kubernetes: scale")
        try:
            await asyncio.shield(changing)
        except asyncio.CancelledError:
            while not changing.done():
                try:
                    await asyncio.wait([changing])
                except asyncio.CancelledError:
                    continue
            if not changing.cancelled():
                changing.exception()
            raise

    async def close(self) -> None:
        kube, self._kube = self._kube, None
        if kube is not None:
            await kube.__aexit__()

    # ------------------------------------------------------------------ changes

    async def _scale(self, targets: Mapping[str, int], reason: str) -> None:
        async with self._lock:
            before = await self._ready_to_change(targets)
            await self._write(before, targets)
            after = await self._verify(targets)
            await self._tell(before, after, reason)
            if self.wait_stable:
                await self._settle(targets)

    async def _ready_to_change(self, targets: Mapping[str, int]) -> Mapping[str, Workload]:
        """What runs, once no rolling update is in the way."""
        end, pauses = time.monotonic() + self.verify_timeout, _pauses()
        while True:
            workloads = await self._read()
            self._others.notice(workloads)
            for role, count in targets.items():
                if role not in workloads:
                    raise ScaleRefused(f"there are no {role} workers to scale; there are {', '.join(sorted(workloads))}")
                if count < 0:
                    raise ScaleRefused(f"there cannot be {count} {role} workers")
            changed = {role: workloads[role] for role, count in targets.items() if workloads[role].desired != count}
            self._others.refuse(changed)
            rolling = next((workload.rolling for workload in changed.values() if workload.rolling), None)
            if rolling is None:
                return workloads
            if time.monotonic() > end:
                raise ConnectorUnavailable(f"{rolling}, and nothing is scaled meanwhile")
            await asyncio.sleep(next(pauses))

    async def _write(self, workloads: Mapping[str, Workload], targets: Mapping[str, int]) -> None:
        kube, done = self._open(), list[str]()
        for attempt in range(_TRIES):
            planned = writes([(workloads[role], count) for role, count in targets.items() if workloads[role].desired != count])
            try:
                if len(planned) > 1:  # nothing is changed if one of several is refused
                    for write in planned:
                        await write.send(kube, dry_run=True)
                for write in planned:
                    for workload, count in write.changes:
                        self._others.trying(workload.role, count)
                    await write.send(kube)
                    for workload, count in write.changes:
                        self._others.ours(workload.role, count)
                        done.append(f"{workload.role} to {count}")
                return
            except Unreachable as e:
                raise ConnectorUnavailable(f"{e}{_so_far(done)}") from e
            except Refused as e:
                read = await self._read()
                self._others.notice(read)
                moved = e.code in (CONFLICT, NOT_FOUND) or any(_place(read[role]) != _place(workloads[role]) for role in targets if role in read)
                if e.code not in (CONFLICT, NOT_FOUND, INVALID) or not moved or not set(targets) <= set(read) or attempt == _TRIES - 1:
                    if done:
                        raise ConnectorUnavailable(f"the API server refused: {e}{_so_far(done)}") from e
                    raise ScaleRefused(f"the API server refused: {e}") from e
                self._others.refuse({role: read[role] for role, count in targets.items() if read[role].desired != count})
                workloads = read

    async def _verify(self, targets: Mapping[str, int]) -> Mapping[str, Workload]:
        """Read back what was written, and that the operator has carried it on."""
        end, pauses = time.monotonic() + self.verify_timeout, _pauses()
        while True:
            workloads = await self._read()
            for role, count in targets.items():
                if workloads[role].desired != count:
                    self._others.notice(workloads)
                    by = workloads[role].writer or "somebody else"
                    raise ConnectorUnavailable(f"{role} was set to {count}, and {by} has set it to {workloads[role].desired} since")
            waiting = [workloads[role].name for role in targets if not workloads[role].carried]
            if not waiting:
                return workloads
            if time.monotonic() > end:
                raise ConnectorUnavailable(f"{', '.join(waiting)}: the scaling adapter took the number, and the operator has not carried it to {self.graph} "
                                           f"within {self.verify_timeout:g} s; does the operator run?")
            await asyncio.sleep(next(pauses))

    async def _settle(self, targets: Mapping[str, int]) -> None:
        end, pauses = time.monotonic() + self.wait_stable, _pauses()
        while True:
            states = await self._states(await self._read())
            unsettled = [f"{role}: {states[role].ready} of {states[role].desired} ready, {states[role].draining} draining, {states[role].reducible} stuck"
                         for role in targets if not states[role].stable]
            if not unsettled:
                return
            if time.monotonic() > end:
                raise ConnectorUnavailable(f"written, and not stable after {self.wait_stable:g} s: {'; '.join(unsettled)}")
            await asyncio.sleep(next(pauses))

    async def _tell(self, before: Mapping[str, Workload], after: Mapping[str, Workload], reason: str) -> None:
        """An event beside each object that was changed, for `kubectl describe`. Nothing depends on it."""
        kube = self._open()
        for role, workload in after.items():
            if (was := before[role].desired if role in before else None) == workload.desired:
                continue
            log.info("%s: %s -> %s (%s)", role, was, workload.desired, reason)
            moment = now()[:19] + "Z"
            event = {"metadata": {"generateName": f"{workload.regards['name']}-scaled-"}, "involvedObject": workload.regards,
                     "type": "Normal", "reason": "Scaled",
                     "message": f"{role} {was} -> {workload.desired}: {reason}"[:1024], "source": {"component": MANAGER},
                     "count": 1, "firstTimestamp": moment, "lastTimestamp": moment}
            try:
                await kube.call("POST", kube.path("v1", "events"), event)
            except (Refused, Unreachable) as e:
                log.debug("no event was written: %s", e)

    # ------------------------------------------------------------------ looking

    async def _read(self) -> Mapping[str, Workload]:
        try:
            return await self._source.read(self._open())
        except (Unreachable, Refused) as e:
            raise ConnectorUnavailable(f"what runs is unknown: {e}") from e
        except LookupError as e:
            raise ConnectorUnavailable(f"what runs is unknown: {e.args[0]}") from e

    async def _states(self, workloads: Mapping[str, Workload]) -> Mapping[str, RoleState]:
        kube = self._open()
        try:
            pods = {role: (await kube.listing(kube.path("v1", "pods"), labelSelector=workload.selector))[0] for role, workload in workloads.items()}
        except (Unreachable, Refused) as e:
            raise ConnectorUnavailable(f"what runs is unknown: {e}") from e
        self._counter.forget({pod["metadata"]["uid"] for found in pods.values() for pod in found})
        return {role: self._counter.state(workload, pods[role]) for role, workload in workloads.items()}

    def _open(self) -> Kube:
        if self._kube is None:
            raise ConnectorUnavailable("the connector is not connected")
        return self._kube


def _pauses() -> Iterator[float]:
    """Each half as long again as the one before."""
    pause, longest = _LOOKS
    while True:
        yield pause
        pause = min(1.5 * pause, longest)


def _place(workload: Workload) -> tuple[Dial, int]:
    """What a write was tested against."""
    return workload.dial, workload.desired


def _so_far(done: list[str]) -> str:
    return f"; set before that: {', '.join(done)}" if done else ""
