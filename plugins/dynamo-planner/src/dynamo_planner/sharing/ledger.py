"""Who may use how many GPUs of one budget. Knows no clock and no network: callers say what time it is.

What is in use counts first: a planner holds the more of what it was granted and what it says is in use, so a role that drains holds its GPUs until it is
gone. A wish that does not fit is parked as an intent, and granted when room appears. Everything follows from what planners say every few seconds, so that
a new ledger knows all of it after one lease; until then it grants nothing new.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
from attrs import validators as v

from dynamo_core.config import Secret


@attrs.frozen
class Member:
    """A planner that may ask."""

    token: Secret
    """What it proves itself by: at least 16 characters, of nobody else."""
    priority: int = 0
    """Higher goes first."""
    share: float = attrs.field(default=1.0, validator=v.gt(0))
    """Of what is left between planners of one priority, when they want more than there is."""
    minimum: int = attrs.field(default=0, validator=v.ge(0))
    """GPUs that are kept for it, whether it wants them or not."""


@attrs.frozen
class Grant:
    """The answer to a planner. All counts are GPUs."""

    granted: int
    """What it may have."""
    parked: int | None
    """What it wants and may not have yet; it is granted later, by the answer to a later call."""
    free: int
    """What could be granted to it now, beyond what it has."""
    limit: int | None
    """Somebody else has a better claim: go down to this. `None`: stay."""
    why: str
    """A sentence for people."""


@attrs.define(eq=False)
class _Account:
    name: str
    terms: Member
    expires: float
    granted: int = 0
    in_use: int = 0
    wanted: int = 0
    since: float | None = None
    """When the intent was parked; `None`: there is none."""

    @property
    def held(self) -> int:
        return max(self.granted, self.in_use)

    @property
    def missing(self) -> int:
        """Of what is kept for it, what it does not have."""
        return max(0, self.terms.minimum - self.held)


@attrs.define(eq=False)
class Ledger:
    gpus: int
    """The budget."""
    members: Mapping[str, Member]
    lease: float
    """Seconds after its last call after which a planner counts as gone."""
    patience: float
    """Seconds for which an intent lets smaller ones overtake it; then it waits for room at their cost, and for others to go down to their share."""
    started: float
    _accounts: dict[str, _Account] = attrs.field(init=False, factory=dict[str, _Account])

    def ask(self, name: str, wanted: int, in_use: int, now: float) -> Grant:
        """A planner says what it wants and what it uses. Also the sign that it lives, so it is asked every few seconds."""
        self.expire(now)
        account = self._accounts.get(name)
        if account is None:
            # Whoever was here before the ledger has what it uses: it was granted by the one before.
            account = self._accounts[name] = _Account(name, self.members[name], now, granted=in_use if self._warming(now) else 0)
        account.expires = now + self.lease
        account.in_use, account.wanted = in_use, wanted
        if wanted <= account.granted:
            account.granted, account.since = wanted, None
        elif account.since is None:
            account.since = now
        self.settle(now)
        return self._answer(account, now)

    def expire(self, now: float) -> list[str]:
        """Planners that have not called for a lease lose what they had. Returns who."""
        gone = [account.name for account in self._accounts.values() if account.expires <= now]
        for name in gone:
            del self._accounts[name]
        return gone

    def settle(self, now: float) -> None:
        """Grant the intents that fit, the best claim first."""
        if self._warming(now):
            return
        for account in self._intents():
            assert account.since is not None
            if account.wanted - account.held <= self._room(account):
                account.granted, account.since = account.wanted, None
            elif now - account.since >= self.patience:
                return

    def free(self) -> int:
        """What is neither held nor kept for anybody."""
        return max(0, self.gpus - sum(account.held for account in self._accounts.values()) - sum(map(self._missing, self.members)))

    def shares(self) -> dict[str, int]:
        """What each planner is entitled to of what all want now: minimums first, then by priority, then by share."""
        wants = {name: max(account.wanted, 0) for name, account in self._accounts.items()}
        given = {name: min(wants[name], self.members[name].minimum) for name in wants}
        left = self.gpus - sum(given.values()) - sum(self.members[name].minimum for name in self.members if name not in wants)
        for priority in sorted({self.members[name].priority for name in wants}, reverse=True):
            rivals = sorted(name for name in wants if self.members[name].priority == priority)
            while left > 0 and (hungry := [name for name in rivals if given[name] < wants[name]]):
                # One GPU at a time to whoever has least for his share: budgets are small numbers, and whole ones.
                least = min(hungry, key=lambda name: ((given[name] + 1) / self.members[name].share, name))
                given[least] += 1
                left -= 1
        return given

    def holdings(self) -> dict[str, tuple[int, int, int]]:
        """Granted, in use and parked GPUs of each planner that lives."""
        return {name: (a.granted, a.in_use, a.wanted if a.since is not None else 0) for name, a in sorted(self._accounts.items())}

    def _intents(self) -> list[_Account]:
        waiting = [account for account in self._accounts.values() if account.since is not None]
        return sorted(waiting, key=lambda a: (-a.terms.priority, a.held / a.terms.share, a.since or 0.0, a.name))

    def _room(self, account: _Account) -> int:
        """What could be added to what it holds. Below zero when more is in use than there is."""
        held = sum(each.held for each in self._accounts.values())
        return self.gpus - held - sum(self._missing(name) for name in self.members if name != account.name)

    def _missing(self, name: str) -> int:
        account = self._accounts.get(name)
        return self.members[name].minimum if account is None else account.missing

    def _warming(self, now: float) -> bool:
        return now < self.started + self.lease

    def _answer(self, account: _Account, now: float) -> Grant:
        free, parked = max(0, self._room(account)), account.wanted if account.since is not None else None
        limit = self._limit(account, now)
        if parked is None:
            why = f"{account.granted} of {self.gpus} GPUs are granted"
        elif self._warming(now):
            why = f"this global planner has just started, and learns for {self.started + self.lease - now:.0f} s more who has what"
        elif account.wanted > self.gpus:
            why = f"{account.wanted} GPUs are more than the budget of {self.gpus}"
        else:
            why = f"{account.wanted} GPUs do not fit: {account.held} are held and {free} could be had now; the wish is parked, and granted when there is room"
        if limit is not None:
            why += f"; others have a better claim, so go down to {limit}"
        return Grant(account.granted, parked, free, limit, why)

    def _limit(self, account: _Account, now: float) -> int | None:
        """How far a planner has to go down so that an intent that has waited long enough gets its share."""
        shares = self.shares()
        excess = account.granted - shares[account.name]
        starving = [a for a in self._intents() if a is not account and a.since is not None and now - a.since >= self.patience and a.wanted <= shares[a.name]]
        return shares[account.name] if excess > 0 and starving and not self._warming(now) else None
