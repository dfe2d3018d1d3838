"""The conformance kit of connectors. Inherit it, provide `connector`, and run pytest.

    class TestMine(ConnectorContract):
        roles = ("prefill", "decode")

        @pytest.fixture
        async def connector(self, platform):
            connector = MyConnector(...)
            await connector.start()
            yield connector
            await connector.close()

The guarantees, at length in docs/contracts/connector.md: C1 roles, C2 verified, C3 comes to be, C4 nothing else, C5 refusals, C6 down first, C7 deaths,
C8 reducible, C9 outages, C10 cancelled and at once. What a platform cannot do (kill a replica, break one, go away) its test class leaves out, and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager

import pytest

from dynamo_core.ending import ended
from dynamo_core.errors import ConnectorUnavailable, ScaleRefused
from dynamo_core.scaling import ROLES, Connector, RoleState


class ConnectorContract:
    """Give `connector` as a fixture: started, with replicas that get ready within `patience`, and room for four of each role."""

    roles: tuple[str, ...] = ("prefill", "decode")
    """Of the deployment; tests of several roles need two."""
    patience: float = 60.0
    """Seconds in which what was asked for has come to be."""
    poll: float = 0.1
    """Seconds between two looks."""

    async def kill(self, connector: Connector, role: str) -> bool:
        """End one serving replica of the role without the connector's knowledge. `False`: this platform gives no way to."""
        return False

    async def heal(self, connector: Connector, role: str) -> None:
        """The loss was seen: let the platform replace what `kill` ended. Nothing, where it does so by itself and takes long enough to be seen without."""

    async def spoil(self, connector: Connector, role: str) -> bool:
        """From now on new replicas of the role never serve, and this is known within `patience`. `False`: as above."""
        return False

    def outage(self, connector: Connector) -> AbstractAsyncContextManager[None] | None:
        """While entered, the platform does not answer. `None`: it cannot be away while the connector runs."""
        return None

    # ------------------------------------------------------------------ what runs

    async def test_c1_every_role_is_named_and_every_replica_counted_once(self, connector: Connector) -> None:
        for count in (1, 0):
            await connector.scale(dict.fromkeys(self.roles, count), reason="contract")
            await self.settled(connector, dict.fromkeys(self.roles, count))
        assert set(self.roles) <= set(ROLES)

    async def test_c2_the_targets_are_desired_as_soon_as_scale_has_returned(self, connector: Connector) -> None:
        for counts in ((1, 2), (2, 1), (0, 1)):
            targets = dict(zip(self.roles, counts, strict=False))
            await connector.scale(targets, reason="contract")
            assert self.desired(await self.look(connector)) == targets

    async def test_c3_what_is_desired_comes_to_be_and_is_stable_then(self, connector: Connector) -> None:
        role = self.roles[0]
        await connector.scale(dict.fromkeys(self.roles, 0), reason="contract")
        await self.settled(connector, dict.fromkeys(self.roles, 0))
        await connector.scale({role: 2}, reason="contract")
        state = (await self.look(connector))[role]
        assert not state.stable or state.ready == 2, "two replicas are said to be stable before they serve"
        await self.settled(connector, {**dict.fromkeys(self.roles, 0), role: 2})
        await connector.scale({role: 0}, reason="contract")
        await self.settled(connector, dict.fromkeys(self.roles, 0))

    async def test_c4_what_is_not_named_stays_and_what_is_there_is_not_made_again(self, connector: Connector) -> None:
        first, *others = self.roles
        await connector.scale(dict.fromkeys(self.roles, 1), reason="contract")
        await self.settled(connector, dict.fromkeys(self.roles, 1))
        def still(seen: Mapping[str, RoleState]) -> bool:
            return all(state.stable and state.ready == 1 for state in seen.values())

        await self.change(connector, {first: 1}, watch=still)
        await self.change(connector, {}, watch=still)
        for _ in range(5):
            seen = await self.look(connector)
            assert still(seen), f"a target that changes nothing moved {seen}"
            await asyncio.sleep(self.poll)
        await connector.scale({first: 2}, reason="contract")
        seen = await self.settled(connector, {**dict.fromkeys(self.roles, 1), first: 2}, watch=lambda seen: all(seen[role].ready == 1 for role in others))
        assert all(seen[role].desired == 1 for role in others)

    # ------------------------------------------------------------------ changes

    async def test_c5_a_refusal_changes_nothing(self, connector: Connector) -> None:
        first = self.roles[0]
        await connector.scale(dict.fromkeys(self.roles, 1), reason="contract")
        before = self.desired(await self.look(connector))
        for refused in ({first: 2, "no-such-role": 1}, {first: -1}, {first: 2, self.roles[-1]: -1}):
            with pytest.raises(ScaleRefused):
                await connector.scale(refused, reason="contract")
            assert self.desired(await self.look(connector)) == before, f"{refused} was refused, and half of it done"

    async def test_c6_what_goes_down_goes_first(self, connector: Connector) -> None:
        if len(self.roles) < 2:
            return
        down, up = self.roles[:2]
        for one, other in ((down, up), (up, down)):
            before = {one: 2, other: 1}
            await connector.scale(before, reason="contract")
            await self.settled(connector, before)
            most = self.footprint(await self.look(connector))

            def no_more(seen: Mapping[str, RoleState], most: int = most) -> bool:
                return self.footprint(seen) <= most

            await self.change(connector, {other: 2, one: 1}, watch=no_more)
            await self.settled(connector, {one: 1, other: 2}, watch=no_more)

    async def test_c7_a_replica_that_dies_has_a_successor(self, connector: Connector) -> None:
        role = self.roles[0]
        targets = {**dict.fromkeys(self.roles, 0), role: 2}
        await connector.scale(targets, reason="contract")
        await self.settled(connector, targets)
        if not await self.kill(connector, role):
            return
        await self.until(connector, lambda seen: seen[role].ready < 2 and not seen[role].stable, "a dead replica counts as ready")
        await self.heal(connector, role)
        assert self.desired(await self.look(connector)) == targets
        await self.settled(connector, targets)

    async def test_c8_a_replica_that_never_serves_is_reducible_and_goes_first(self, connector: Connector) -> None:
        role = self.roles[0]
        targets = {**dict.fromkeys(self.roles, 0), role: 1}
        await connector.scale(targets, reason="contract")
        await self.settled(connector, targets)
        if not await self.spoil(connector, role):
            return
        await connector.scale({role: 2}, reason="contract")
        seen = await self.until(connector, lambda seen: seen[role].reducible == 1, "a replica that never serves is not said to be reducible")
        assert (seen[role].ready, seen[role].starting, seen[role].stable) == (1, 1, False)
        await connector.scale({role: 1}, reason="contract")
        await self.settled(connector, targets, watch=lambda seen: seen[role].ready == 1)

    # ------------------------------------------------------------------ trouble

    async def test_c9_an_outage_is_an_error_and_not_a_count_of_zero(self, connector: Connector) -> None:
        targets = dict.fromkeys(self.roles, 1)
        await connector.scale(targets, reason="contract")
        await self.settled(connector, targets)
        if (outage := self.outage(connector)) is None:
            return
        async with outage:
            with pytest.raises(ConnectorUnavailable):
                async with asyncio.timeout(self.patience):
                    await connector.observe()
        await self.settled(connector, targets)
        await connector.scale({self.roles[0]: 2}, reason="contract")
        await self.settled(connector, {**targets, self.roles[0]: 2})

    async def test_c10_changes_that_come_at_once_leave_one_of_them_whole(self, connector: Connector) -> None:
        choices = [dict.fromkeys(self.roles, count) for count in (1, 2, 0)]
        done = await asyncio.gather(*(connector.scale(targets, reason="contract") for targets in choices), return_exceptions=True)
        assert all(error is None or isinstance(error, ScaleRefused | ConnectorUnavailable) for error in done), done
        assert any(error is None for error in done), f"every one of several changes was turned away: {done}"
        accepted = [targets for targets, error in zip(choices, done, strict=True) if error is None]
        assert self.desired(await self.look(connector)) in accepted
        final = accepted[0]
        await connector.scale(final, reason="contract")
        await self.settled(connector, final)

    async def test_c10_a_change_that_is_cancelled_is_made_whole_or_not_at_all(self, connector: Connector) -> None:
        await connector.scale(dict.fromkeys(self.roles, 1), reason="contract")
        old, new = dict.fromkeys(self.roles, 1), dict.fromkeys(self.roles, 2)
        changing = asyncio.create_task(connector.scale(new, reason="contract"))
        await asyncio.sleep(0)
        await ended(changing)
        assert self.desired(await self.look(connector)) in (old, new)
        await connector.scale(old, reason="contract")
        await self.settled(connector, old)

    async def test_c10_closing_twice_is_silent(self, connector: Connector) -> None:
        await connector.close()
        await connector.close()
        with pytest.raises(ConnectorUnavailable):
            await connector.observe()
        with pytest.raises(ConnectorUnavailable):
            await connector.scale(dict.fromkeys(self.roles, 1), reason="contract")

    # ------------------------------------------------------------------ looking

    def desired(self, seen: Mapping[str, RoleState]) -> dict[str, int]:
        return {role: state.desired for role, state in seen.items()}

    def footprint(self, seen: Mapping[str, RoleState]) -> int:
        """Replicas that serve or will, of all roles."""
        return sum(state.ready + state.starting for state in seen.values())

    async def look(self, connector: Connector) -> Mapping[str, RoleState]:
        """One observation, which must make sense whatever happens meanwhile."""
        seen = await connector.observe()
        assert set(seen) == set(self.roles), f"a deployment of {self.roles} is seen as {tuple(seen)}"
        for role, state in seen.items():
            assert min(state.desired, state.ready, state.starting, state.draining, state.gpus_per_replica, state.reducible) >= 0, f"{role}: {state}"
            assert state.reducible <= state.starting, f"{role}: more will never serve than are starting: {state}"
            still = state.ready == state.desired and not state.starting and not state.draining
            assert state.stable == still, f"{role}: `stable` is {state.stable}: {state}"
        return seen

    async def change(self, connector: Connector, targets: Mapping[str, int], *, watch: Callable[[Mapping[str, RoleState]], bool]) -> None:
        """Scale, and look on: `watch` must hold at every moment."""
        changing = asyncio.ensure_future(connector.scale(targets, reason="contract"))
        while not changing.done():
            seen = await self.look(connector)
            assert watch(seen), f"while it was asked for {dict(targets)}: {dict(seen)}"
            await asyncio.sleep(self.poll / 4)
        await changing

    async def until(self, connector: Connector, condition: Callable[[Mapping[str, RoleState]], bool], otherwise: str) -> Mapping[str, RoleState]:
        seen: Mapping[str, RoleState] = {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.patience):
                while True:
                    with contextlib.suppress(ConnectorUnavailable):  # a platform may need a moment after an outage
                        seen = await self.look(connector)
                        if condition(seen):
                            return seen
                    await asyncio.sleep(self.poll)
        raise AssertionError(f"{otherwise}; after {self.patience:g} s: {dict(seen)}")

    async def settled(self, connector: Connector, targets: Mapping[str, int], *,
                      watch: Callable[[Mapping[str, RoleState]], bool] = lambda seen: True) -> Mapping[str, RoleState]:
        """Wait until the targets are what runs. `watch` must hold on the way."""

        def arrived(seen: Mapping[str, RoleState]) -> bool:
            assert watch(seen), f"on the way to {dict(targets)}: {dict(seen)}"
            return all(seen[role].stable and seen[role].ready == count for role, count in targets.items())

        return await self.until(connector, arrived, f"{dict(targets)} was asked for and did not come to be")
