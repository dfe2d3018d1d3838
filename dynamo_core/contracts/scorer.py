"""What every scorer must do: R1 to R6 of `docs/contracts/routing.md`, over generated fleets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.contracts.fleets import as_array, cases, cpu_us, kit_settings, typical, values_of
from dynamo_core.routing.contract import Fact, Fleet, RoutingRequest, Scorer


class ScorerContract:
    """Inherit, and return your scorer from a fixture named `scorer`.

    Override `values` when a fact of your own has values that its type does not tell.
    """

    @pytest.fixture
    def scorer(self) -> Scorer:
        raise NotImplementedError("return the scorer under test from a fixture named `scorer`")

    def values(self, fact: Fact[Any]) -> st.SearchStrategy[Any]:
        """What a column of `fact` may hold."""
        return values_of(fact)

    def test_r1_it_declares_facts_and_can_score(self, scorer: Scorer) -> None:
        assert isinstance(scorer, Scorer), "a scorer has `needs` and `score(request, fleet)`"
        assert all(isinstance(fact, Fact) for fact in scorer.needs), "`needs` lists facts"

    def test_r2_its_scale_is_unit_or_raw(self, scorer: Scorer) -> None:
        assert getattr(scorer, "scale", "unit") in ("unit", "raw")

    @kit_settings
    @given(data=st.data())
    def test_r1_it_reads_only_declared_facts(self, scorer: Scorer, data: st.DataObject) -> None:
        case = data.draw(cases(scorer.needs, self.values))
        fleet = case.watched()
        scorer.score(case.request, fleet)
        assert fleet.read <= {fact.name for fact in scorer.needs}, "it read facts that are not in `needs`"

    @kit_settings
    @given(data=st.data())
    def test_r2_one_finite_score_for_each_worker(self, scorer: Scorer, data: st.DataObject) -> None:
        case = data.draw(cases(scorer.needs, self.values))
        scores = _scores(scorer.score, case.request, case.fleet())
        assert len(scores) == len(case.workers)
        assert all(math.isfinite(x) for x in scores)

    @kit_settings
    @given(data=st.data())
    def test_r2_unit_scores_are_from_0_to_1(self, scorer: Scorer, data: st.DataObject) -> None:
        case = data.draw(cases(scorer.needs, self.values))
        if getattr(scorer, "scale", "unit") == "unit":
            assert all(-1e-9 <= x <= 1 + 1e-9 for x in _scores(scorer.score, case.request, case.fleet())), 'for another range, set scale = "raw"'

    @kit_settings
    @given(data=st.data())
    def test_r3_the_order_of_workers_does_not_matter(self, scorer: Scorer, data: st.DataObject) -> None:
        case = data.draw(cases(scorer.needs, self.values))
        order = data.draw(st.permutations(range(len(case.workers))))
        straight = _scores(scorer.score, case.request, case.fleet())
        assert _scores(scorer.score, case.request, case.permuted(order).fleet()) == pytest.approx([straight[i] for i in order], rel=1e-9, abs=1e-12)

    @kit_settings
    @given(data=st.data())
    def test_r4_inputs_are_not_written_to(self, scorer: Scorer, data: st.DataObject) -> None:
        request, fleet, written = data.draw(cases(scorer.needs, self.values)).writable()
        scorer.score(request, fleet)
        assert written() is None, "it wrote to its inputs"

    @kit_settings
    @given(data=st.data())
    def test_r4_read_only_arrays_do_as_well_as_tuples(self, scorer: Scorer, data: st.DataObject) -> None:
        case = data.draw(cases(scorer.needs, self.values))
        expected = _scores(scorer.score, case.request, case.fleet())
        assert _scores(scorer.score, case.request, case.fleet(as_array)) == pytest.approx(expected, rel=1e-6, abs=1e-9)

    @kit_settings
    @given(data=st.data())
    def test_r6_the_same_input_gives_the_same_scores(self, scorer: Scorer, data: st.DataObject) -> None:
        case, other = data.draw(cases(scorer.needs, self.values)), data.draw(cases(scorer.needs, self.values))
        first = _scores(scorer.score, case.request, case.fleet())
        scorer.score(other.request, other.fleet())
        assert _scores(scorer.score, case.request, case.fleet()) == first, "it remembers, or it throws dice of its own"

    def test_its_cost_is_noted(self, scorer: Scorer, record_property: Callable[[str, object], None]) -> None:
        """No limit: CPU microseconds for 64 workers go into the test report (`--junitxml`)."""
        case = typical(scorer.needs)
        fleet = case.fleet()
        record_property("cpu_us_64_workers", round(cpu_us(lambda: scorer.score(case.request, fleet)), 1))


def _scores(score: Callable[[RoutingRequest, Fleet], Sequence[float]], request: RoutingRequest, fleet: Fleet) -> list[float]:
    return list(map(float, score(request, fleet)))
