"""Propose: what the expected load needs, by the latency targets and what one replica can do."""

from __future__ import annotations

from typing import ClassVar, Literal

import attrs

from dynamo_planner.contract import Outlook, Proposal, View
from dynamo_planner.history import RECENT, merged
from dynamo_planner.stages import capacity


@attrs.frozen
class Sla:
    """As many replicas as keep the expected load within the targets. A floor: what is seen now may ask for more, not for less."""

    stage: ClassVar[Literal["propose"]] = "propose"
    plan_for: Literal["mean", "high"] = "high"
    """The expected load, or the upper end of its interval."""

    def propose(self, view: View, outlook: Outlook | None) -> Proposal | None:
        if outlook is None or view.performance is None:
            return None
        recent = merged(view.history[-RECENT:])
        rate, prompt, output = ((part.high if self.plan_for == "high" else part.mean) for part in (outlook.rate, outlook.prompt_tokens, outlook.output_tokens))
        demand = capacity.Demand(rate, prompt, output, view.history[-1].cached_share, recent.prompt_spread)
        needs: dict[str, capacity.Need] = {}
        for role in view.roles:
            if role == "prefill":
                needs[role] = capacity.prefill(demand, view.performance, view.ttft, view.share)
            elif role == "decode":
                needs[role] = capacity.decode(demand, view.performance, view.itl, view.share)
            else:
                needs[role] = capacity.aggregated(demand, view.performance, view.ttft, view.itl, view.share)
        return Proposal("sla", "at_least", {role: need.replicas for role, need in needs.items()}, {role: need.why for role, need in needs.items()})
