"""What every picker must do: R1 to R4 and R6 of `docs/contracts/routing.md`, over generated totals and seeded dice."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.contracts.fleets import Case, cases, cpu_us, kit_settings, typical, values_of
from dynamo_core.routing.contract import Dice, Fact, Picker

_THROWS = 400


class PickerContract:
    """Inherit, and return your picker from a fixture named `picker`.

    Override `values` when a fact of your own has values that its type does not tell.
    """

    @pytest.fixture
    def picker(self) -> Picker:
        raise NotImplementedError("return the picker under test from a fixture named `picker`")

    def values(self, fact: Fact[Any]) -> st.SearchStrategy[Any]:
        """What a column of `fact` may hold."""
        return values_of(fact)

    def draw(self, data: st.DataObject, picker: Picker) -> tuple[Case, tuple[float, ...], int]:
        """A fleet, a total for each row, and a seed."""
        case = data.draw(cases(_needs(picker), self.values))
        total = st.one_of(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), st.floats(-1e9, 1e9))
        few, seed = data.draw(st.lists(total, min_size=1, max_size=5)), data.draw(st.integers(0, 2**64 - 1))
        deal = Dice(seed + 1)
        return case, tuple(few[deal.below(len(few))] for _ in case.workers), seed

    def test_r1_it_can_pick(self, picker: Picker) -> None:
        assert isinstance(picker, Picker), "a picker has `pick(totals, fleet, dice)`"
        assert all(isinstance(fact, Fact) for fact in _needs(picker)), "`needs` lists facts"

    @kit_settings
    @given(data=st.data())
    def test_r1_it_reads_only_declared_facts(self, picker: Picker, data: st.DataObject) -> None:
        case, totals, seed = self.draw(data, picker)
        fleet = case.watched()
        picker.pick(totals, fleet, Dice(seed))
        assert fleet.read <= {fact.name for fact in _needs(picker)}, "it read facts that are not in `needs`"

    @kit_settings
    @given(data=st.data())
    def test_r2_it_picks_a_row_of_the_fleet(self, picker: Picker, data: st.DataObject) -> None:
        case, totals, seed = self.draw(data, picker)
        row = picker.pick(totals, case.fleet(), Dice(seed))
        assert 0 <= operator.index(row) < len(totals), "rows count from 0, below the length of the fleet"

    def test_r2_a_higher_total_is_no_disadvantage(self, picker: Picker) -> None:
        for high in (1e-6, 1.0, 1000.0):
            picked = _tally(picker, (0.0, high))
            assert picked[1] > 0.4 * _THROWS, f"of two workers it took the one with the higher total {picked[1]} times in {_THROWS}"

    def test_r3_equals_have_equal_chances_wherever_they_stand(self, picker: Picker) -> None:
        picked = _tally(picker, (1.0, 1.0, 1.0, 1.0))
        assert all(picked[row] > 0.15 * _THROWS for row in range(4)), f"ties must be broken by the dice, not by position: {dict(picked)} of {_THROWS}"

    @kit_settings
    @given(data=st.data())
    def test_r4_inputs_are_not_written_to(self, picker: Picker, data: st.DataObject) -> None:
        case, totals, seed = self.draw(data, picker)
        _, fleet, written = case.writable()
        writable = list(totals)
        picker.pick(writable, fleet, Dice(seed))
        assert tuple(writable) == totals, "it wrote to the totals"
        assert written() is None, "it wrote to its inputs"

    @kit_settings
    @given(data=st.data())
    def test_r6_the_same_dice_give_the_same_row(self, picker: Picker, data: st.DataObject) -> None:
        case, totals, seed = self.draw(data, picker)
        other, more, _ = self.draw(data, picker)
        first = picker.pick(totals, case.fleet(), Dice(seed))
        picker.pick(more, other.fleet(), Dice(seed))
        assert picker.pick(totals, case.fleet(), Dice(seed)) == first, "it remembers, or it throws dice of its own"

    def test_its_cost_is_noted(self, picker: Picker, record_property: Callable[[str, object], None]) -> None:
        """No limit: CPU microseconds for 64 workers go into the test report (`--junitxml`)."""
        case = typical(_needs(picker))
        fleet, totals = case.fleet(), tuple(row / 64 for row in range(64))
        record_property("cpu_us_64_workers", round(cpu_us(lambda: picker.pick(totals, fleet, Dice(1))), 1))


def _needs(picker: Picker) -> Collection[Fact[Any]]:
    return getattr(picker, "needs", ())


def _tally(picker: Picker, totals: Sequence[float]) -> Counter[int]:
    case = typical(_needs(picker), len(totals))
    alike = case.permuted([0] * len(totals))
    fleet = Case(case.request, case.workers, alike.columns, _needs(picker)).fleet()
    return Counter(picker.pick(tuple(totals), fleet, Dice(seed)) for seed in range(_THROWS))
