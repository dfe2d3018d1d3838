"""The built-in pool strategies, and the kit that every strategy meets."""

from __future__ import annotations

import inspect
import random

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.cli.check import check
from dynamo_core.config import load_with_plugins
from dynamo_core.errors import ConfigError
from dynamo_global_router.contract import Choice, Estimate, PoolFacts, PoolName, PoolRequest
from dynamo_global_router.grid import Axis, Grid, Override
from dynamo_global_router.kit import POOLS, StrategyContract
from dynamo_global_router.predicted import Predicted

NAMES = ("fast", "middle", "slow")


def grid(**changes) -> Grid:
    """TTFT up to 1 s in two steps, ITL up to 100 ms in three."""
    options = {"table": (("fast", "fast", "middle"), ("fast", "middle", "slow")), "ttft_ms": Axis(0, 1000, 2), "itl_ms": Axis(10, 100, 3), **changes}
    return Grid(**options)


def bound(strategy, role="aggregated", pools=POOLS):
    strategy.bind(pools, role)
    return strategy


def facts(name: str, ttft: float = 100.0, itl: float = 10.0, **changes) -> PoolFacts:
    pool = next(pool for pool in POOLS if pool.name == name)
    estimate = {key: changes.pop(key) for key in ("ttft_error", "itl_error", "samples", "age_s") if key in changes}
    return attrs.evolve(PoolFacts(pool.name, pool.rank, pool.cost, estimate=Estimate(ttft, itl, **{"age_s": 0.0, **estimate})), **changes)


def asked(ttft: float | None = None, itl: float | None = None, **other) -> PoolRequest:
    return PoolRequest("r", ttft_target_ms=ttft, itl_target_ms=itl, **other)


def chosen(strategy, request: PoolRequest, *pools: PoolFacts) -> list[str]:
    return [pools[row].name for row in strategy.choose(request, pools).order]


ALL = tuple(facts(name) for name in NAMES)

# ---------------------------------------------------------------------- the contract


class TestGrid(StrategyContract):
    misfit = (PoolName("another", 0, 1.0),)

    @pytest.fixture
    def strategy_factory(self):
        return lambda: grid(overrides=(Override("fast", min_priority=50),))


class TestGridWithoutRetry(StrategyContract):
    @pytest.fixture
    def strategy_factory(self):
        return lambda: grid(retry=False)


class TestGridOfPrefill(StrategyContract):
    role = "prefill"

    @pytest.fixture
    def strategy_factory(self):
        return lambda: Grid((("fast", "slow"), ("fast", "fast")), input=Axis(0, 1000, 2), ttft_ms=Axis(0, 1000, 2))


class TestPredicted(StrategyContract):
    @pytest.fixture
    def strategy_factory(self):
        return Predicted


class TestPredictedOfDecode(StrategyContract):
    role = "decode"

    @pytest.fixture
    def strategy_factory(self):
        return lambda: Predicted(retry=False, refresh=0.0)


# ---------------------------------------------------------------------- the kit itself


class Nobody(Predicted):
    def choose(self, request, pools):
        return attrs.evolve(super().choose(request, pools), order=[])


class Twice(Predicted):
    def choose(self, request, pools):
        answer = super().choose(request, pools)
        return attrs.evolve(answer, order=[*answer.order, answer.order[0]])


class Beyond(Predicted):
    def choose(self, request, pools):
        return attrs.evolve(super().choose(request, pools), order=[len(pools)])


class Silent(Predicted):
    def choose(self, request, pools):
        return attrs.evolve(super().choose(request, pools), why="")


class Talkative(Predicted):
    def choose(self, request, pools):
        return attrs.evolve(super().choose(request, pools), kind=f"for-{request.id}")


class Chance(Predicted):
    def choose(self, request, pools):
        return Choice([random.randrange(len(pools))], "chance", "by chance")


class Turns(Predicted):
    turn = 0

    def choose(self, request, pools):
        type(self).turn += 1
        return Choice([type(self).turn % len(pools)], "turn", "each in its turn")


class Sorts(Predicted):
    def choose(self, request, pools):
        if isinstance(pools, list):
            pools.sort(key=lambda pool: pool.cost)
        return Choice([0], "first", "the cheapest")


class FirstRow(Predicted):
    def choose(self, request, pools):
        return Choice([0], "first", "the first")


class TakesAnything(Grid):
    def bind(self, pools, role):
        self._pools = {pool.name: pool for pool in pools}


FAULTS = (Nobody, Twice, Beyond, Silent, Talkative, Chance, Turns, Sorts, FirstRow)


def verdicts(factory, kit: StrategyContract) -> list[str]:
    """Names of the tests of the kit that fail."""
    found = []
    for name, test in inspect.getmembers(kit, inspect.ismethod):
        if not name.startswith("test_"):
            continue
        arguments = {}
        for parameter in inspect.signature(test).parameters:
            arguments[parameter] = bound(factory()) if parameter == "strategy" else factory
        try:
            test(**arguments)
        except (Exception, pytest.fail.Exception):
            found.append(name)
    return found


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_kit_rejects_each_planted_fault(fault) -> None:
    assert verdicts(fault, StrategyContract())
    assert verdicts(Predicted, StrategyContract()) == []


def test_the_kit_rejects_a_strategy_that_takes_pools_it_cannot_work_with() -> None:
    made = grid()
    options = {"table": made.table, "ttft_ms": made.ttft_ms, "itl_ms": made.itl_ms}
    assert verdicts(lambda: TakesAnything(**options), TestGrid()) == ["test_s1_it_refuses_pools_that_it_cannot_work_with"]


# ---------------------------------------------------------------------- the grid


@given(st.floats(-1e6, 1e6), st.floats(0.001, 1e6), st.integers(1, 50), st.floats(-1e7, 1e7))
def test_an_axis_has_equal_steps_and_ends_where_it_ends(low, width, steps, value) -> None:
    axis = Axis(low, low + width, steps)
    index = axis.index(value)
    assert 0 <= index < steps
    assert axis.index(low) == 0
    assert axis.index(low - 1) == 0
    assert axis.index(low + width + 1) == steps - 1
    if low <= value < low + width:
        assert low + index * width / steps <= value + width * 1e-6
        assert value <= low + (index + 1) * width / steps + width * 1e-6


def test_what_nobody_said_is_in_the_middle_and_zero_is_zero() -> None:
    axis = Axis(0, 300, 3)
    assert axis.index(None) == 1
    assert axis.index(0.0) == 0


def test_the_table_is_looked_up_by_targets() -> None:
    strategy = bound(grid())
    assert chosen(strategy, asked(100, 20), *ALL) == ["fast"]
    assert chosen(strategy, asked(100, 99), *ALL) == ["middle", "fast"]
    assert chosen(strategy, asked(900, 500), *ALL) == ["slow", "middle", "fast"]
    assert "nobody said" in strategy.choose(asked(900, None), ALL).why


def test_a_third_axis_takes_the_length_of_the_prompt() -> None:
    cheap = (("slow", "slow", "slow"), ("slow", "slow", "slow"))
    strategy = bound(grid(table=(cheap, grid().table), input=Axis(0, 2000, 2)))
    assert chosen(strategy, asked(100, 20, input_tokens=10), *ALL)[0] == "slow"
    assert chosen(strategy, asked(100, 20, input_tokens=1500), *ALL)[0] == "fast"


def test_a_priority_beats_the_table_and_the_first_one_that_fits_wins() -> None:
    strategy = bound(grid(overrides=(Override("middle", 10, 19), Override("fast", 10))))
    assert strategy.choose(asked(900, 500, priority=15), ALL).kind == "override"
    assert chosen(strategy, asked(900, 500, priority=15), *ALL)[0] == "middle"
    assert chosen(strategy, asked(900, 500, priority=20), *ALL)[0] == "fast"
    assert chosen(strategy, asked(900, 500, priority=9), *ALL)[0] == "slow"


def test_only_faster_pools_are_tried_after_the_chosen_one() -> None:
    assert chosen(bound(grid()), asked(900, 40), *ALL) == ["middle", "fast"]
    assert chosen(bound(grid(retry=False)), asked(900, 40), *ALL) == ["middle"]


def test_for_a_pool_that_is_not_there_stands_in_the_nearest_faster_one_then_the_nearest_slower_one() -> None:
    strategy = bound(grid())
    assert chosen(strategy, asked(900, 500), facts("fast"), facts("middle")) == ["middle", "fast"]
    assert chosen(strategy, asked(100, 20), facts("slow"), facts("middle")) == ["middle", "slow"]
    answer = strategy.choose(asked(900, 500), [facts("fast")])
    assert answer.kind == "substitute"
    assert "is slow, which cannot take it; fast stands in" in answer.why


@pytest.mark.parametrize(("changes", "role", "message"), [
    ({"table": (("fast",) * 3, ("fsat",) * 3)}, "aggregated", "names the pool 'fsat', which is not among the pools: fast, middle, slow, spare"),
    ({"table": (("fast",) * 3,)}, "aggregated", "has 1 entries in table, and 2 steps of ttft_ms"),
    ({"table": (("fast",) * 3, ("fast",) * 2)}, "aggregated", r"has 2 entries in table\[1\], and 3 steps of itl_ms"),
    ({"input": Axis(0, 1, 2), "ttft_ms": Axis(0, 1, 3)}, "aggregated", r"too few: table\[0\]\[0\] must be an array"),
    ({"table": ((("fast",), ("fast",), ("fast",)),) * 2}, "aggregated", "one dimension too many"),
    ({"overrides": (Override("nobody"),)}, "aggregated", "names the pool 'nobody'"),
    ({}, "prefill", "of a router of role 'prefill' needs the axes input, ttft_ms; it has ttft_ms, itl_ms"),
    ({"ttft_ms": None}, "decode", "needs the axes input, itl_ms; it has itl_ms"),
])
def test_a_grid_that_does_not_fit_says_what_is_wrong(changes, role, message) -> None:
    with pytest.raises(ConfigError, match=message):
        grid(**changes).bind(POOLS, role)


STACK = """
[[workers]]
[workers.engine]
use = "global-router"
pools = [{ name = "fast" }, { name = "slow" }]
strategy = { use = "grid", table = [["fast", "slow"]], ttft_ms = { min = 0, max = 100, steps = 1 }, itl_ms = { min = 0, max = 100, steps = 2 } }
"""


def test_a_grid_is_written_in_toml_and_mistakes_have_their_place() -> None:
    load_with_plugins(text=STACK, environ={})
    for wrong, message in (
        ("max = 100, steps = 1", ("max = -1, steps = 1", "max must be above min, which is 0: -1")),
        ("steps = 2", ("steps = 0", "steps")),
        ("use = \"grid\", table", ("use = \"grid\", rety = true, table", "did you mean 'retry'")),
        ("{ name = \"slow\" }", ("{ name = \"fast\" }", "two pools are called 'fast'")),
        ("{ name = \"slow\" }", ("{ name = \"slow\", namespace = \"fast\" }", "two pools are the namespace 'fast'")),
        ("use = \"grid\"", ("use = \"gird\"", "did you mean 'grid'")),
        ("pools = [{ name = \"fast\" }, { name = \"slow\" }]", ("", "it needs `pools`")),
    ):
        with pytest.raises(ConfigError, match=message[1]):
            load_with_plugins(text=STACK.replace(wrong, message[0]), environ={})


def test_dynamo_check_finds_what_does_not_go_together_all_at_once(tmp_path, capsys) -> None:
    path = tmp_path / "stack.toml"
    path.write_text(STACK)
    assert check(path) == 0
    path.write_text('namespace = "slow"\n' + STACK.replace('[["fast", "slow"]]', '[["quick", "slow"]]'))
    assert check(path) == 2
    said = capsys.readouterr().err
    assert "stack.toml:7: pool strategy 'grid' names the pool 'quick'" in said
    assert "a pool has the namespace of the global router itself, 'slow'" in said


# ---------------------------------------------------------------------- predicted


def test_the_cheapest_pool_that_meets_the_targets_is_chosen() -> None:
    strategy = bound(Predicted())
    fast, middle, slow = facts("fast", 50, 5), facts("middle", 200, 10), facts("slow", 800, 40)
    assert chosen(strategy, asked(1000, 50), fast, middle, slow) == ["slow", "middle", "fast"]
    assert chosen(strategy, asked(500, 50), fast, middle, slow) == ["middle", "fast", "slow"]
    assert chosen(strategy, asked(1000, 8), fast, middle, slow)[0] == "fast"
    assert chosen(strategy, asked(), fast, middle, slow)[0] == "slow"
    assert chosen(strategy, asked(100), fast, middle, slow)[0] == "fast"


def test_when_no_pool_meets_them_the_closest_one_is_chosen_and_says_so() -> None:
    strategy = bound(Predicted())
    answer = strategy.choose(asked(10, 1), [facts("slow", 100, 20), facts("fast", 50, 5)])
    assert answer.order == [1, 0]
    assert answer.kind == "closest"
    assert "5.00 times what is wanted" in answer.why
    assert answer.notes[0] == "TTFT 100 > 10 ms, ITL 20.0 > 1 ms"


def test_the_usual_error_is_added_before_a_target_counts_as_met() -> None:
    pools = (facts("slow", 90, 10, ttft_error=0.2), facts("fast", 50, 5))
    assert chosen(bound(Predicted()), asked(100), *pools)[0] == "fast"
    assert chosen(bound(Predicted(caution=0.0)), asked(100), *pools)[0] == "slow"


def test_a_prefill_router_has_no_time_between_tokens_and_a_decode_router_no_first_token() -> None:
    pools = (facts("slow", 900, 10), facts("fast", 50, 30))
    assert chosen(bound(Predicted(), "prefill"), asked(100, 20, role="prefill"), *pools)[0] == "fast"
    assert chosen(bound(Predicted(), "decode"), asked(100, 20, role="decode"), *pools)[0] == "slow"


def test_a_cheaper_pool_that_seemed_too_slow_long_ago_is_tried_once_in_a_while() -> None:
    strategy = bound(Predicted(refresh=60.0))
    old, new = facts("slow", 900, age_s=61.0, samples=50), facts("slow", 900, age_s=59.0, samples=50)
    answer = strategy.choose(asked(100), [facts("fast", 50), old])
    assert (answer.order, answer.kind) == ([1, 0], "refresh")
    assert chosen(strategy, asked(100), facts("fast", 50), new)[0] == "fast"
    assert chosen(strategy, asked(100), facts("fast", 50), facts("slow", 900, age_s=31.0, samples=10))[0] == "slow", "little is known of it"
    assert chosen(strategy, asked(100), facts("fast", 50), facts("slow", 900, age_s=0.5, samples=0))[0] == "fast", "one is on its way"
    assert chosen(strategy, asked(100, priority=1), facts("fast", 50), old)[0] == "fast", "who is urgent tries nothing out"
    assert chosen(bound(Predicted(refresh=0.0)), asked(100), facts("fast", 50), old)[0] == "fast"
    assert chosen(strategy, asked(1000), facts("slow", 50), facts("fast", 2000, age_s=1e9))[0] == "slow", "an expensive pool is not worth a trial"


def test_without_retry_only_the_choice_is_named() -> None:
    assert chosen(bound(Predicted(retry=False)), asked(1000), *ALL) == ["slow"]
