"""The last decision again, with another load or other settings. The same stages decide; nothing is done."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import attrs

from dynamo_core.errors import ConfigError, Problem
from dynamo_planner.contract import Load, Observation
from dynamo_planner.mind import Mind
from dynamo_planner.record import Decision

_CHANGE = re.compile(r"(load|prompt|output)=(\d+(?:\.\d+)?)x")
_FIELD = {"load": "rate", "prompt": "prompt_tokens", "output": "output_tokens"}


def changes(words: Sequence[str]) -> dict[str, float]:
    """`load=2x`, `prompt=0.5x`, `output=1.5x`. :raises ConfigError: anything else."""
    found: dict[str, float] = {}
    for word in words:
        if (match := _CHANGE.fullmatch(word)) is None:
            raise ConfigError(Problem(f"{word!r} is not a change", remedy="write load=2x, prompt=1.5x or output=0.5x; --set changes settings"))
        found[_FIELD[match[1]]] = float(match[2])
    return found


def what_if(mind: Mind, past: Sequence[Decision], factors: Mapping[str, float]) -> Decision:
    """Decide for the last recorded state, as if the load had been this much greater all along.

    Workers' reports are not recorded, so that the stage `load` sees none and keeps what is there.

    :param mind: built from the settings to try; it has not made a decision. :raises ConfigError: nothing usable was recorded.
    """
    usable = [decision for decision in past if decision.fleet and not decision.missing]
    if not usable:
        raise ConfigError(Problem("no decision was recorded yet that saw everything", remedy="let `dynamo planner run` make a few"))
    last = usable[-1]
    for decision in past:
        mind.notice(decision.at, {role: seen.state() for role, seen in decision.fleet.items()})
        if decision.interval is not None:
            load = _scaled(decision.interval.load(), factors)
            mind.history.restore(load)
            mind.learn(decision.interval.load(), {role: seen.state() for role, seen in decision.fleet.items()})
    mind.cold_start = last.cold_start or mind.cold_start
    load = _scaled(last.load.load(), factors) if last.load is not None else None
    observation = Observation(last.at, load, {role: seen.state() for role, seen in last.fleet.items()})
    return mind.decide(observation)


def _scaled(load: Load, factors: Mapping[str, float]) -> Load:
    scaled = {name: getattr(load, name) * factor for name, factor in factors.items()}
    return attrs.evolve(load, in_progress=load.in_progress * factors.get("rate", 1.0), **scaled)
