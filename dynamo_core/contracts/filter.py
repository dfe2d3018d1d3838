"""What every filter must do: R1 and R3 to R6 of `docs/contracts/routing.md`, over generated fleets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.contracts.fleets import as_array, cases, cpu_us, kit_settings, typical, values_of
from dynamo_core.routing.contract import Fact, Filter


class FilterContract:
    """Inherit, and return your filter from a fixture named `filter`.

    Override `values` when a fact of your own has values that its type does not tell.
    """

    @pytest.fixture
    def filter(self) -> Filter:
        raise NotImplementedError("return the filter under test from a fixture named `filter`")

    def values(self, fact: Fact[Any]) -> st.SearchStrategy[Any]:
        """What a column of `fact` may hold."""
        return values_of(fact)

    def test_r1_it_declares_facts_and_can_reject(self, filter: Filter) -> None:
        assert isinstance(filter, Filter), "a filter has `needs` and `reject(request, fleet)`"
        assert all(isinstance(fact, Fact) for fact in filter.needs), "`needs` lists facts"
        assert isinstance(getattr(filter, "busy", False), bool), "`busy` is true or false"

    @kit_settings
    @given(data=st.data())
    def test_r1_it_reads_only_declared_facts(self, filter: Filter, data: st.DataObject) -> None:
        case = data.draw(cases(filter.needs, self.values))
        fleet = case.watched()
        filter.reject(case.request, fleet)
        assert fleet.read <= {fact.name for fact in filter.needs}, "it read facts that are not in `needs`"

    @kit_settings
    @given(data=st.data())
    def test_r3_the_order_of_workers_does_not_matter(self, filter: Filter, data: st.DataObject) -> None:
        case = data.draw(cases(filter.needs, self.values))
        order = data.draw(st.permutations(range(len(case.workers))))
        straight = {case.workers[row] for row in filter.reject(case.request, case.fleet())}
        back = case.permuted(order)
        assert {back.workers[row] for row in filter.reject(case.request, back.fleet())} == straight

    @kit_settings
    @given(data=st.data())
    def test_r4_inputs_are_not_written_to(self, filter: Filter, data: st.DataObject) -> None:
        request, fleet, written = data.draw(cases(filter.needs, self.values)).writable()
        filter.reject(request, fleet)
        assert written() is None, "it wrote to its inputs"

    @kit_settings
    @given(data=st.data())
    def test_r4_read_only_arrays_do_as_well_as_tuples(self, filter: Filter, data: st.DataObject) -> None:
        case = data.draw(cases(filter.needs, self.values))
        assert set(filter.reject(case.request, case.fleet(as_array))) == set(filter.reject(case.request, case.fleet()))

    @kit_settings
    @given(data=st.data())
    def test_r5_it_names_rows_of_the_fleet_each_with_a_reason(self, filter: Filter, data: st.DataObject) -> None:
        case = data.draw(cases(filter.needs, self.values))
        rejected: Any = filter.reject(case.request, case.fleet())
        assert isinstance(rejected, Mapping), "`reject` returns {row: reason}, empty when nobody is rejected"
        assert all(type(row) is int and 0 <= row < len(case.workers) for row in rejected), "rows count from 0, below the length of the fleet"
        assert all(isinstance(reason, str) and reason.strip() for reason in rejected.values()), "a reason is a sentence"

    @kit_settings
    @given(data=st.data())
    def test_r6_the_same_input_gives_the_same_answer(self, filter: Filter, data: st.DataObject) -> None:
        case, other = data.draw(cases(filter.needs, self.values)), data.draw(cases(filter.needs, self.values))
        first = dict(filter.reject(case.request, case.fleet()))
        filter.reject(other.request, other.fleet())
        assert dict(filter.reject(case.request, case.fleet())) == first, "it remembers, or it throws dice of its own"

    def test_its_cost_is_noted(self, filter: Filter, record_property: Callable[[str, object], None]) -> None:
        """No limit: CPU microseconds for 64 workers go into the test report (`--junitxml`)."""
        case = typical(filter.needs)
        fleet = case.fleet()
        record_property("cpu_us_64_workers", round(cpu_us(lambda: filter.reject(case.request, fleet)), 1))
