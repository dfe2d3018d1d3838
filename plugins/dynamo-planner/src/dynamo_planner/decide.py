"""One decision: the stages in their order, and what each of them said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import attrs

from dynamo_core.errors import PluginError
from dynamo_planner.contract import Constrained, ConstrainStage, Load, Outlook, PredictStage, Proposal, ProposeStage, ReconcileStage, Targets, View
from dynamo_planner.record import ConstraintSaid, Decision, ForecastSeen, LoadSeen, ProposalSaid, RoleSeen
from dynamo_planner.stages.constraints import LAST_WORD

T = TypeVar("T")


@attrs.define(eq=False)
class Stages:
    """The stages that the configuration chose. What limits them (`LAST_WORD`) is not a choice."""

    predict: PredictStage
    propose: Sequence[ProposeStage]
    reconcile: ReconcileStage
    constrain: Sequence[ConstrainStage] = ()
    _foreseen: tuple[Sequence[Load], float, Outlook | None] | None = attrs.field(init=False, default=None)
    """The last outlook and what it was made from: a forecast costs more than the rest of a decision, and the history grows only now and then."""

    def decide(self, view: View) -> Decision:
        """The decision for this view. Nothing is done and nothing is remembered. :raises PluginError: a stage broke its contract; it is named."""
        outlook = self._outlook(view)
        proposals = [p for stage in self.propose if (p := _blamed(stage, partial(stage.propose, view, outlook))) is not None]
        reconciled = _whole(self.reconcile, view, _blamed(self.reconcile, partial(self.reconcile.reconcile, view, proposals)))
        targets, said = reconciled, list[ConstraintSaid]()
        for stage in (*self.constrain, *LAST_WORD):
            before = targets
            ruled: Constrained = _blamed(stage, partial(stage.constrain, view, before))
            targets = _whole(stage, view, ruled.targets)
            changed = [role for role in targets if targets[role] != before[role]]
            said += [ConstraintSaid(_name(stage), role, before[role], targets[role], ruled.why.get(role, "")) for role in changed]
        return Decision(
            at=view.at, load=LoadSeen.of(view.observation.load), fleet={role: RoleSeen.of(state) for role, state in view.observation.fleet.items()},
            performance=view.performance.source if view.performance is not None else "", forecast=ForecastSeen.of(outlook),
            proposals=[ProposalSaid.of(p) for p in proposals], wanted=dict(reconciled), constraints=said, targets=dict(targets),
            silent=_silent(view, proposals, self.propose), gpus=sum(view.gpus(role) * count for role, count in targets.items()),
        )

    def _outlook(self, view: View) -> Outlook | None:
        if self._foreseen is None or self._foreseen[0] is not view.history or self._foreseen[1] != view.cold_start:
            self._foreseen = (view.history, view.cold_start, _blamed(self.predict, partial(self.predict.predict, view)))
        return self._foreseen[2]


def _silent(view: View, proposals: Sequence[Proposal], stages: Sequence[ProposeStage]) -> str:
    """Why nobody, or not everybody, proposed something."""
    if len(proposals) == len(stages):
        return ""
    return "nothing is known of the engine's performance yet" if view.performance is None else "there is no history yet"


def _blamed(stage: object, call: Callable[[], T]) -> T:
    try:
        return call()
    except Exception as e:
        raise PluginError(f"planner stage {_name(stage)}", f"{type(e).__name__}: {e}") from e


def _whole(stage: object, view: View, targets: Targets) -> dict[str, int]:
    """The targets, if they are a count of at least zero for every role."""
    if set(targets) != set(view.roles) or any(count < 0 for count in targets.values()):
        raise PluginError(f"planner stage {_name(stage)}", f"the targets {dict(targets)} are not one count for each of {', '.join(view.roles)}")
    return dict(targets)


def _name(stage: object) -> str:
    return str(getattr(stage, "name", type(stage).__name__))
