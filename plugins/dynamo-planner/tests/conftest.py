"""What several tests of the planner build: an engine, views and loads with simple numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from dynamo_core.scaling import RoleState
from dynamo_planner.contract import Limits, Load, Observation, View, WorkerReport
from dynamo_planner.performance.live import Linear
from dynamo_planner.predict.baselines import Constant


@pytest.fixture(scope="session")
def engine() -> Linear:
    return Linear(step=0.005, sequence=0.0002, read=1e-8, prompt=0.01, prompt_token=2e-5, seen=64.0, source="a test")


@pytest.fixture(scope="session")
def state() -> Callable[..., RoleState]:
    def make(desired: int, ready: int | None = None, *, gpus: int = 1, reducible: int = 0) -> RoleState:
        ready = desired if ready is None else ready
        return RoleState(desired=desired, ready=ready, starting=desired - ready, draining=0, gpus_per_replica=gpus, stable=ready == desired, reducible=reducible)

    return make


@pytest.fixture(scope="session")
def view(engine: Linear, state: Callable[..., RoleState]) -> Callable[..., View]:
    """One request a second of 1000 + 100 tokens on two aggregated workers, unless a test says otherwise."""

    def make(*, at: float = 1000.0, load: Load | None = None, fleet: Mapping[str, RoleState] | None = None, reports: Sequence[WorkerReport] = (),
             history: Sequence[Load] = (), **changes: Any) -> View:
        fleet = fleet if fleet is not None else {"aggregated": state(2)}
        load = load or Load(at, 10.0, rate=1.0, prompt_tokens=1000.0, output_tokens=100.0)
        made: dict[str, Any] = {
            "at": at, "observation": Observation(at, load, fleet, reports), "history": history or (load,), "roles": tuple(fleet), "performance": engine,
            "predictor": Constant(), "ttft": 0.5, "itl": 0.02, "share": 0.95, "limits": Limits(patience=0.0), "interval": 60.0, "cold_start": 60.0,
        }
        return View(**(made | changes))

    return make
