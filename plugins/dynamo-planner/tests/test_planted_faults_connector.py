"""Connectors that break one guarantee each: the kit finds every one."""

from __future__ import annotations

import asyncio
import inspect
import sys
from pathlib import Path

import attrs
import pytest

from dynamo_core.discovery.file import FileDiscovery
from dynamo_core.errors import ConnectorUnavailable, ScaleRefused
from dynamo_planner.connectors.kit import ConnectorContract
from dynamo_planner.connectors.virtual import VirtualConnector

sys.path.insert(0, str(Path(__file__).parent))

from test_connector_virtual import TestVirtual as Kit
from test_connector_virtual import acting


class ForgetsEmptyRoles(VirtualConnector):
    async def observe(self):
        return {role: state for role, state in (await super().observe()).items() if state.desired}


class CountsTwice(VirtualConnector):
    def _state(self, *facts):
        state = super()._state(*facts)
        return attrs.evolve(state, starting=state.starting + state.ready)


class WritesNothing(VirtualConnector):
    async def _decide(self, targets, reason):
        return None


class WritesLater(VirtualConnector):
    async def _decide(self, targets, reason):
        later = super()._decide

        async def write():
            await asyncio.sleep(0.1)
            await later(targets, reason)

        self._writes = asyncio.create_task(write())


class SaysStableTooSoon(VirtualConnector):
    def _state(self, *facts):
        return attrs.evolve(super()._state(*facts), stable=True)


class IsNeverStable(VirtualConnector):
    def _state(self, *facts):
        return attrs.evolve(super()._state(*facts), stable=False)


class ForgetsWhatIsNotNamed(VirtualConnector):
    async def _decide(self, targets, reason):
        await super()._decide({**dict.fromkeys(self.gpus, 0), **targets}, reason)


class MakesItAnew(VirtualConnector):
    async def _decide(self, targets, reason):
        await super()._decide(dict.fromkeys(targets, 0), reason)
        await asyncio.sleep(0.2)
        await super()._decide(targets, reason)


class DoesHalf(VirtualConnector):
    async def scale(self, targets, *, reason):
        for role, count in targets.items():
            await super().scale({role: count}, reason=reason)


class RoundsUpToZero(VirtualConnector):
    async def scale(self, targets, *, reason):
        await super().scale({role: max(0, count) for role, count in targets.items()}, reason=reason)


class IgnoresUnknownRoles(VirtualConnector):
    async def scale(self, targets, *, reason):
        await super().scale({role: count for role, count in targets.items() if role in self.gpus}, reason=reason)


class GoesUpFirst(VirtualConnector):
    async def _decide(self, targets, reason):
        last = await self._decisions.last()
        old = last.targets if last else {}
        await super()._decide({role: max(count, old.get(role, 0)) for role, count in targets.items()}, reason)
        await asyncio.sleep(0.2)
        await super()._decide(targets, reason)


class LooksAwayWhileItMoves(VirtualConnector):
    """Both roles are written at once, but the one that grows is done before the other is told."""

    async def _decide(self, targets, reason):
        for role, count in sorted(targets.items(), key=lambda target: -target[1]):
            await super()._decide({role: count}, reason)
            await asyncio.sleep(0.1)

    async def scale(self, targets, *, reason):
        self._moving = asyncio.create_task(super().scale(targets, reason=reason))
        await asyncio.sleep(0.05)


class CountsTheDead(VirtualConnector):
    def _state(self, role, running, desired, refused):
        return super()._state(role, max(running, desired), desired, refused)


class GivesUpTheDead(VirtualConnector):
    def _state(self, role, running, desired, refused):
        self._seen = max(getattr(self, "_seen", 0), running)
        return super()._state(role, running, running if self._seen == 2 else desired, refused)


class KeepsHoping(VirtualConnector):
    def _state(self, *facts):
        return attrs.evolve(super()._state(*facts), reducible=0)


class CountsZeroWhenItCannotKnow(VirtualConnector):
    async def observe(self):
        try:
            return await super().observe()
        except ConnectorUnavailable:
            return {role: self._state(role, 0, 0, False) for role in self.gpus}


class WritesRoleByRole(VirtualConnector):
    """Each role by itself, without a lock: two changes at once are mixed."""

    async def scale(self, targets, *, reason):
        for role, count in targets.items():
            await super().scale({role: count}, reason=reason)
            await asyncio.sleep(0.02 * (1 + count))


class ClosesOnce(VirtualConnector):
    async def close(self):
        if self._exits is None:
            raise ScaleRefused("closed already")
        await super().close()


class GoesOnWhenClosed(VirtualConnector):
    async def close(self):
        self._last = await super().observe() if self._exits else self._last
        await super().close()

    async def observe(self):
        return await super().observe() if self._exits else self._last


FAULTS = [
    (ForgetsEmptyRoles, "c1"), (CountsTwice, "c1"), (WritesNothing, "c2"), (WritesLater, "c2"), (SaysStableTooSoon, "c3"), (IsNeverStable, "c3"),
    (ForgetsWhatIsNotNamed, "c4"), (MakesItAnew, "c4"), (DoesHalf, "c5"), (RoundsUpToZero, "c5"), (IgnoresUnknownRoles, "c5"), (GoesUpFirst, "c6"),
    (LooksAwayWhileItMoves, "c6"), (CountsTheDead, "c7"), (GivesUpTheDead, "c7"), (KeepsHoping, "c8"), (CountsZeroWhenItCannotKnow, "c9"),
    (WritesRoleByRole, "c10"), (ClosesOnce, "c10"), (GoesOnWhenClosed, "c10"),
]


async def finds(cls: type[VirtualConnector], guarantee: str, folder: Path, patience: float = 3.0) -> bool:
    for name, test in inspect.getmembers(ConnectorContract, inspect.isfunction):
        if not name.startswith(f"test_{guarantee}_"):
            continue
        place = folder / name[:20]
        kit = Kit()
        kit.patience = patience
        async with acting(place / "discovery") as actor:
            kit.actor, kit.folder = actor, place / "discovery"
            connector = cls(gpus={"prefill": 1, "decode": 2}, ready_timeout=1.0)
            await connector.follow(FileDiscovery(place / "discovery"), "dynamo")
            try:
                await test(kit, connector)
            except (Exception, pytest.fail.Exception):
                return True
            finally:
                await VirtualConnector.close(connector)
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "guarantee"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
async def test_the_kit_finds(fault, guarantee, tmp_path):
    assert await finds(fault, guarantee, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("guarantee", sorted({guarantee for _, guarantee in FAULTS}))
async def test_the_kit_finds_nothing_in_a_connector_that_is_sound(guarantee, tmp_path):
    assert not await finds(VirtualConnector, guarantee, tmp_path, patience=60.0)
