"""The faults of `make chaos`, on a small fleet, in a short time: nothing fails, no token is lost or doubled, nobody who is gone is chosen."""

from __future__ import annotations

import pytest

from benchmarks.chaos.__main__ import SHORT, run
from benchmarks.chaos.crowd import soak
from benchmarks.chaos.faults import FAULTS


@pytest.mark.slow
async def test_one_fault_after_another_loses_nothing(tmp_path):
    chosen = [fault for fault in FAULTS if fault.short]
    verdicts, left_out = await run(chosen, SHORT, seed=1, folder=tmp_path)
    assert not left_out
    assert len(verdicts) == len(chosen)
    assert {verdict.fault: verdict.violations for verdict in verdicts if verdict.violations} == {}


@pytest.mark.slow
async def test_memory_stays_flat_under_steady_load(tmp_path):
    result = await soak(tmp_path / "soak", 20.0, SHORT)
    assert result.wrong == []
