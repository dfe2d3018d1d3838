"""A plugin of the planner that knows the rates to come, though not the single requests. `Site` of planner_site.py installs it for the planner that it starts."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import attrs
import msgspec

from dynamo_core import hookimpl
from dynamo_core.plugins import Registry
from dynamo_planner.contract import Expected, Outlook, View


class Future(msgspec.Struct, frozen=True):
    """The file that the oracle reads."""

    start: float
    """Unix time of the first rate."""
    rates: list[float]
    """Requests per second, second by second."""
    prompt: float
    output: float
    """Mean tokens of a request."""


@attrs.frozen
class Oracle:
    """Predict stage: the highest rate until a replica that is started now serves, and one interval on."""

    stage: ClassVar[Literal["predict"]] = "predict"
    file: Path
    """A `Future` as JSON; as long as it is not there, nothing is known."""

    def predict(self, view: View) -> Outlook | None:
        try:
            future = msgspec.json.decode(self.file.read_bytes(), type=Future)
        except FileNotFoundError:
            return None
        now = max(0, int(view.at - future.start))
        horizon = view.cold_start + 2 * view.interval
        rate = max(future.rates[now : now + round(horizon) + 1], default=0.0)
        return Outlook(*(Expected(value, value, value) for value in (rate, future.prompt, future.output)), by="oracle", horizon=horizon)


@hookimpl
def dynamo_register(registry: Registry) -> None:
    registry.add("planner_stage", "oracle", f"{__name__}:Oracle", summary="knows the rates to come")
