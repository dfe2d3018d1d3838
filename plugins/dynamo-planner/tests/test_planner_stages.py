"""Propose, reconcile, constrain: each by itself, and what no decision may break."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.errors import ConfigError, PluginError
from dynamo_core.plugins import Plugins
from dynamo_planner import build
from dynamo_planner.config import Metrics, Planner
from dynamo_planner.contract import Constrained, Expected, Limits, Load, Outlook, Proposal, Unstarted, WorkerReport
from dynamo_planner.decide import Stages
from dynamo_planner.stages.constraints import Budget, Idle, Patience, Reachable, Step, share
from dynamo_planner.stages.forecast import ForecastLoad
from dynamo_planner.stages.load import ByLoad
from dynamo_planner.stages.merge import Merge
from dynamo_planner.stages.sla import Sla


def expected(rate: float, prompt: float = 1000.0, output: float = 100.0) -> Outlook:
    return Outlook(*(Expected(value, value, value) for value in (rate, prompt, output)), "a test")


def worker(role: str = "aggregated", **said: float) -> WorkerReport:
    return WorkerReport("w", role, **said)


# ------------------------------------------------------------------ predict


def test_the_forecast_looks_as_far_as_a_new_replica_needs(view):
    rising = tuple(Load(i * 60.0, 60.0, rate=1.0 + i, prompt_tokens=500.0, output_tokens=50.0) for i in range(20))
    soon, late = (ForecastLoad().predict(view(history=rising, cold_start=cold)) for cold in (0.0, 600.0))
    assert soon.horizon == 60.0
    assert late.horizon == 660.0
    assert soon.rate.mean == pytest.approx(20.0)
    assert ForecastLoad().predict(view(history=rising)).rate.low <= 20.0
    assert ForecastLoad().predict(view(load=Load(0, 1), history=())) is not None


def test_intervals_without_requests_do_not_count_as_short_prompts(view):
    history = (Load(60, 60.0, 1.0, 800.0, 40.0), Load(120, 60.0, 0.0, 0.0, 0.0))
    assert ForecastLoad().predict(view(history=history)).prompt_tokens.mean == pytest.approx(800.0)


# ------------------------------------------------------------------ propose


def test_the_plan_follows_the_forecast_for_each_role(view, state):
    seen = view(fleet={"prefill": state(1), "decode": state(1)})
    small, large = Sla().propose(seen, expected(1.0)), Sla().propose(seen, expected(300.0))
    assert small.kind == "at_least"
    assert set(small.targets) == {"prefill", "decode"}
    assert all(large.targets[role] > small.targets[role] for role in small.targets)
    assert "300 prompts/s" in large.why["prefill"]


def test_the_plan_may_be_for_the_upper_end_of_the_forecast(view):
    outlook = Outlook(Expected(10, 5, 400), Expected(1000, 1000, 1000), Expected(100, 100, 100))
    assert Sla("high").propose(view(), outlook).targets["aggregated"] > Sla("mean").propose(view(), outlook).targets["aggregated"]


def test_without_a_forecast_or_a_performance_nothing_is_planned(view):
    assert Sla().propose(view(), None) is None
    assert Sla().propose(view(performance=None), expected(1.0)) is None


def test_pressure_raises_in_proportion_and_at_once(view):
    full = [worker(kv_share=0.99, running=30, waiting=40) for _ in range(2)]
    proposal = ByLoad().propose(view(reports=full), None)
    assert proposal.targets["aggregated"] >= 5
    assert "waiting requests" in proposal.why["aggregated"]


def test_many_requests_that_wait_only_to_be_read_count_by_the_time_that_takes(view, state):
    """What a frontend has held for a cold model comes at once, and most of it waits for its turn; the worker has room for all of it."""
    awake = [worker(running=2, waiting=13, kv_share=0.05, slots=256, waiting_prefill_tokens=13 * 200)]
    load = (Load(60.0, 60.0, rate=0.5, prompt_tokens=200.0, output_tokens=50.0),)
    known = ByLoad().propose(view(fleet={"aggregated": state(1)}, reports=awake, history=load), None)
    assert known.targets["aggregated"] == 1, known.why
    unknown = ByLoad().propose(view(fleet={"aggregated": state(1)}, reports=awake, history=load, performance=None), None)
    assert unknown.targets["aggregated"] > 8, unknown.why


def test_replicas_that_are_starting_count_before_more_are_asked_for(view, state):
    full = [worker(kv_share=0.99)] * 2
    assert ByLoad().propose(view(fleet={"aggregated": state(6, ready=2)}, reports=full), None).targets["aggregated"] == 6


def test_one_is_taken_away_only_if_the_others_can_carry_what_it_carries(view, state):
    idle = view(fleet={"aggregated": state(3)}, reports=[worker(kv_share=0.1, running=1)] * 3)
    assert ByLoad().propose(idle, None).targets["aggregated"] == 2
    half = view(fleet={"aggregated": state(3)}, reports=[worker(kv_share=0.5, running=1)] * 3)
    assert ByLoad().propose(half, None).targets["aggregated"] == 3, "0.5 x 3 / 2 is above the lower mark"
    coming = view(fleet={"aggregated": state(3, ready=2)}, reports=[worker(kv_share=0.1)] * 2)
    assert ByLoad().propose(coming, None).targets["aggregated"] == 3


def test_between_the_marks_nothing_moves(view, state):
    for share_ in (0.65, 0.7, 0.75, 0.8, 0.85):
        seen = view(fleet={"aggregated": state(4)}, reports=[worker(kv_share=share_, running=1)] * 4)
        assert ByLoad().propose(seen, None).targets["aggregated"] == 4


def test_one_is_not_taken_away_if_the_others_have_no_room_for_its_sequences(view, state):
    busy = view(fleet={"aggregated": state(2)}, reports=[worker(running=5, slots=8)] * 2, performance=None)
    assert ByLoad().propose(busy, None).targets["aggregated"] == 2
    quiet = view(fleet={"aggregated": state(2)}, reports=[worker(running=2, slots=8)] * 2, performance=None)
    assert ByLoad().propose(quiet, None).targets["aggregated"] == 1


def test_latencies_above_their_targets_ask_for_more_of_the_role_that_is_slow(view, state):
    fleet = {"prefill": state(4), "decode": state(4)}
    reports = [worker("prefill")] * 4 + [worker("decode", running=1)] * 4
    load = Load(1000, 10.0, 1.0, 1000.0, 100.0, ttft=9.0, itl=0.01)
    targets = ByLoad().propose(view(fleet=fleet, reports=reports, load=load, performance=None), None).targets
    assert targets["prefill"] == 8, "in proportion, and yet not eighteen times as many"
    assert targets["decode"] == 3


def test_prompts_that_queue_raise_the_prefill_workers_and_no_others(view, state):
    fleet = {"prefill": state(2), "decode": state(2)}
    reports = [worker("prefill", waiting_prefill_tokens=60_000)] * 2 + [worker("decode", running=10, kv_share=0.5)] * 2
    targets = ByLoad().propose(view(fleet=fleet, reports=reports), None).targets
    assert targets["prefill"] > 2
    assert targets["decode"] == 2


def test_requests_that_are_held_for_a_cold_model_wake_it(view, state):
    asleep = {"aggregated": state(0)}
    quiet, held = Load(1000, 10.0), Load(1000, 10.0, held=1.0)
    assert ByLoad().propose(view(fleet=asleep, load=quiet), None).targets["aggregated"] == 0
    assert ByLoad().propose(view(fleet=asleep, load=held), None).targets["aggregated"] == 1


@settings(max_examples=60, deadline=None)
@given(low=st.floats(0, 1), more=st.floats(0, 1), replicas=st.integers(1, 12))
def test_more_load_never_proposes_fewer(view, state, low, more, replicas):
    fleet = {"aggregated": state(replicas)}
    one, other = (ByLoad().propose(view(fleet=fleet, reports=[worker(kv_share=min(1.0, used), running=5)] * replicas), None).targets["aggregated"]
                  for used in (low, low + more))
    assert one <= other


def test_marks_that_would_swing_are_refused():
    with pytest.raises(ValueError, match="down < aim"):
        ByLoad(up=1.0, aim=0.5, down=0.6)


# ------------------------------------------------------------------ reconcile


def test_a_plan_is_a_floor_below_what_reacts(view):
    def of(*said: tuple[str, int]) -> int:
        return Merge().reconcile(view(), [Proposal("x", kind, {"aggregated": count}) for kind, count in said])["aggregated"]

    assert of(("at_least", 5), ("set", 3)) == 5
    assert of(("at_least", 5), ("set", 7)) == 7
    assert of(("at_least", 1)) == 1, "alone, a plan is followed downwards too"
    assert of(("set", 9), ("at_most", 4)) == 4
    assert of(("at_least", 6), ("at_most", 4), ("set", 1)) == 6
    assert of() == 2


# ------------------------------------------------------------------ constrain


def test_fewer_only_after_fewer_were_enough_for_a_while(view):
    limits = Limits(patience=60.0)
    wanted = [(900.0 + 10 * i, {"aggregated": 1}) for i in range(10)]
    assert Patience().constrain(view(limits=limits, wanted=wanted), {"aggregated": 1}).targets["aggregated"] == 1
    assert Patience().constrain(view(limits=limits, wanted=wanted[-3:]), {"aggregated": 1}).targets["aggregated"] == 2
    once_more = [*wanted[:8], (980.0, {"aggregated": 2}), wanted[9]]
    held = Patience().constrain(view(limits=limits, wanted=once_more), {"aggregated": 1})
    assert held.targets["aggregated"] == 2
    assert "within the last 60 s" in held.why["aggregated"]
    assert Patience().constrain(view(limits=limits), {"aggregated": 9}).targets["aggregated"] == 9


def test_steps_are_limited_both_ways(view, state):
    seen = view(fleet={"aggregated": state(20)}, limits=Limits(max_step=3))
    assert Step().constrain(seen, {"aggregated": 90}).targets["aggregated"] == 23
    assert Step().constrain(seen, {"aggregated": 1}).targets["aggregated"] == 17


def test_replicas_that_never_start_are_taken_back(view, state):
    seen = view(fleet={"aggregated": state(6, ready=3, reducible=2)})
    ruled = Reachable().constrain(seen, {"aggregated": 9})
    assert ruled.targets["aggregated"] == 4
    assert "2 of 6 will never start" in ruled.why["aggregated"]


def test_replicas_that_never_started_are_not_asked_for_again_for_a_while(view, state):
    taken_back = {"fleet": {"aggregated": state(4)}, "unstarted": {"aggregated": Unstarted(at=900.0, count=2, beside=4)}, "limits": Limits(retry=300.0)}
    ruled = Reachable().constrain(view(at=1000.0, **taken_back), {"aggregated": 9})
    assert ruled.targets["aggregated"] == 4
    assert ruled.why["aggregated"] == "2 never started 100 s ago; tried again in 200 s"
    assert Reachable().constrain(view(at=1000.0, **taken_back), {"aggregated": 3}).targets["aggregated"] == 3
    assert Reachable().constrain(view(at=1200.0, **taken_back), {"aggregated": 9}).targets["aggregated"] == 9
    more = {**taken_back, "fleet": {"aggregated": state(6, ready=4)}}
    assert Reachable().constrain(view(at=1000.0, **more), {"aggregated": 9}).targets["aggregated"] == 6, "somebody else found room"


def test_a_short_budget_goes_to_the_role_that_lacks_most(view, state):
    seen = view(fleet={"prefill": state(1, gpus=2), "decode": state(1)}, limits=Limits(gpus=10))
    ruled = Budget().constrain(seen, {"prefill": 4, "decode": 8})
    assert ruled.targets["prefill"] * 2 + ruled.targets["decode"] <= 10
    assert ruled.targets["prefill"] >= 2
    assert ruled.targets["decode"] >= 4
    assert "16 GPUs are asked for and 10 may be used" in ruled.why["decode"]


@settings(max_examples=200, deadline=None)
@given(wanted=st.lists(st.integers(0, 40), min_size=2, max_size=2), least=st.lists(st.integers(0, 5), min_size=2, max_size=2),
       cost=st.lists(st.integers(0, 8), min_size=2, max_size=2), budget=st.integers(0, 100))
def test_sharing_out_never_exceeds_the_budget_and_never_gives_more_than_was_wanted(wanted, least, cost, budget):
    roles = ("prefill", "decode")
    asked, floor, price = (dict(zip(roles, values, strict=True)) for values in (wanted, map(min, wanted, least), cost))
    given_ = share(asked, floor, price, budget)
    assert sum(given_[role] * price[role] for role in roles) <= budget
    assert all(0 <= given_[role] <= asked[role] for role in roles)
    if sum(floor[role] * price[role] for role in roles) <= budget:
        assert all(given_[role] >= floor[role] for role in roles)


def test_nothing_runs_after_nobody_has_asked_for_long_enough(view):
    quiet = tuple(Load(60.0 * i, 60.0) for i in range(1, 11))
    asleep = {"load": Load(1000, 10.0), "history": quiet}
    assert Idle().constrain(view(limits=Limits(idle=600.0), **asleep), {"aggregated": 1}).targets["aggregated"] == 0
    assert Idle().constrain(view(limits=Limits(idle=601.0), **asleep), {"aggregated": 1}).targets["aggregated"] == 1
    assert Idle().constrain(view(limits=Limits(), **asleep), {"aggregated": 1}).targets["aggregated"] == 1
    assert Idle().constrain(view(limits=Limits(idle=600.0), load=Load(1000, 10.0, held=2), history=quiet), {"aggregated": 1}).targets["aggregated"] == 1


class Wild:
    """A third party's stage that proposes anything."""

    stage = "propose"

    def __init__(self, targets: dict[str, int]) -> None:
        self.targets = targets

    def propose(self, view, outlook):
        return Proposal("wild", "set", self.targets)


@settings(max_examples=150, deadline=None)
@given(prefill=st.integers(0, 500), decode=st.integers(0, 500), now=st.tuples(st.integers(0, 30), st.integers(0, 30)), budget=st.integers(12, 60),
       step=st.integers(1, 50))
def test_whatever_is_proposed_a_decision_stays_within_budget_and_above_the_minimum(view, state, prefill, decode, now, budget, step):
    fleet = {"prefill": state(now[0], gpus=2), "decode": state(now[1])}
    seen = view(fleet=fleet, limits=Limits(gpus=budget, minimum={"prefill": 2, "decode": 3}, max_step=step, patience=0.0))
    decision = Stages(ForecastLoad(), [Wild({"prefill": prefill, "decode": decode})], Merge()).decide(seen)
    assert decision.targets["prefill"] * 2 + decision.targets["decode"] == decision.gpus <= budget
    assert decision.targets["prefill"] >= 2
    assert decision.targets["decode"] >= 3
    for role, target in decision.targets.items():
        won = decision.won(role)
        assert (won is None) == (decision.wanted[role] == target) or won.after == target
        assert all(said.why for said in decision.constraints)


# ------------------------------------------------------------------ third parties


def test_a_stage_that_breaks_or_cheats_is_named(view):
    class Broken:
        stage = "propose"

        def propose(self, view, outlook):
            raise RuntimeError("no idea")

    class Forgets:
        stage = "constrain"
        name = "forgets"

        def constrain(self, view, targets):
            return Constrained({})

    with pytest.raises(PluginError, match="planner stage Broken: RuntimeError: no idea"):
        Stages(ForecastLoad(), [Broken()], Merge()).decide(view())
    with pytest.raises(PluginError, match="planner stage forgets"):
        Stages(ForecastLoad(), [], Merge(), [Forgets()]).decide(view())


def test_a_stage_of_a_plugin_takes_the_place_of_a_built_in_one(view):
    class Never:
        stage = "constrain"
        name = "maintenance"

        def constrain(self, view, targets):
            return Constrained({role: view.replicas(role) for role in targets}, dict.fromkeys(targets, "maintenance until 18:00"))

    decision = Stages(ForecastLoad(), [Wild({"aggregated": 5})], Merge(), [Never()]).decide(view())
    assert decision.targets == {"aggregated": 2}
    assert decision.constraints[0].why == "maintenance until 18:00"


def test_a_stage_in_the_wrong_place_is_the_operators_mistake():
    from dynamo_core.config import Use

    table = Planner(metrics=Metrics(frontends=("http://x",)), propose=(Use("merge"),))
    with pytest.raises(ConfigError, match="planner.propose uses 'merge', which is a stage of reconcile"):
        build.stages(table, Plugins.load())
