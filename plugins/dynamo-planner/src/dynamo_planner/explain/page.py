"""The report: what the load was, what was expected, what ran, and why; one HTML file without scripts or other files."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from dynamo_planner.explain.svg import Band, Line, plot
from dynamo_planner.explain.text import explain
from dynamo_planner.record import Decision

_STYLE = """
:root{color-scheme:light dark}body{font:15px/1.45 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em}
svg{width:100%;height:auto;font-size:11px;fill:currentColor}.grid{stroke:currentColor;opacity:.15}.mark{stroke:#c33;stroke-dasharray:4 3}
figure{margin:1.5em 0}td,th{padding:.15em .8em .15em 0;text-align:left}pre{overflow-x:auto;font-size:12px}details{margin:.3em 0}
"""
_COLOURS = ("#3572b0", "#c8641e", "#3a8f4b", "#8d4ea8")
SHOWN = 200
"""Decisions that are written out; those that changed something, the newest first."""
_POINTS = 1500


def page(decisions: Sequence[Decision], title: str = "Planner", *, ttft: float | None = None, itl: float | None = None) -> str:
    """:param ttft, itl: targets in seconds, drawn where they are."""
    if not decisions:
        return f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><p>No decision was recorded."
    thin = _thinned(decisions)
    roles = sorted({role for d in decisions for role in d.fleet})
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>{escape(title)}</title>",
             f"<style>{_STYLE}</style><h1>{escape(title)}</h1>", _summary(decisions), _load(thin)]
    parts += [_replicas(thin, role) for role in roles]
    parts += [
        _timed("Time to the first token", [(d.at, d.load.ttft if d.load else None) for d in thin], ttft),
        _timed("Time between tokens", [(d.at, d.load.itl if d.load else None) for d in thin], itl),
    ]
    changed = [d for d in decisions if d.action != "kept" or d.stuck][-SHOWN:]
    parts.append(f"<h2>Decisions</h2><p>The last {len(changed)} of {len(decisions)} that changed something, or could not.</p>")
    for d in reversed(changed):
        head, _, rest = explain(d).partition("\n")
        parts.append(f"<details><summary>{escape(head)}</summary><pre>{escape(rest)}</pre></details>")
    return "\n".join(parts) + "\n"


def _summary(decisions: Sequence[Decision]) -> str:
    first, last = decisions[0], decisions[-1]
    actions = Counter(d.action for d in decisions)
    held = Counter((said.by, said.role) for d in decisions for said in d.constraints)
    gpu_seconds = sum(_gpus(one) * (other.at - one.at) for one, other in pairwise(decisions) if other.at - one.at < 3600)
    rows = [
        ("from", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(first.at))), ("to", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last.at))),
        ("decisions", ", ".join(f"{count} {action}" for action, count in actions.most_common())), ("GPU hours", f"{gpu_seconds / 3600:.2f}"),
        ("held back by", ", ".join(f"{by} ({role}) {count} times" for (by, role), count in held.most_common(5)) or "nothing"),
        ("stuck now", "; ".join(last.stuck) or "nothing"),
    ]
    return "<table>" + "".join(f"<tr><th>{escape(name)}<td>{escape(value)}" for name, value in rows) + "</table>"


def _load(decisions: Sequence[Decision]) -> str:
    seen = Line("arrived", [(d.at, d.load.rate if d.load else None) for d in decisions], _COLOURS[0])
    expected = Line("expected", [(d.at, d.forecast.rate[0] if d.forecast else None) for d in decisions], _COLOURS[1])
    band = Band([(d.at, d.forecast.rate[1], d.forecast.rate[2]) for d in decisions if d.forecast], _COLOURS[1])
    return plot("Load, and the most that was expected until a replica could be ready", "requests/s", [seen, expected], band)


def _replicas(decisions: Sequence[Decision], role: str) -> str:
    def line(name: str, colour: str) -> Line:
        return Line(name, [(d.at, float(getattr(d.fleet[role], name)) if role in d.fleet else None) for d in decisions], colour, steps=True)

    wanted = Line("wanted before constraints", [(d.at, float(d.wanted[role]) if role in d.wanted else None) for d in decisions], _COLOURS[3], steps=True)
    return plot(f"Replicas: {role}", "replicas", [wanted, line("desired", _COLOURS[1]), line("ready", _COLOURS[2])])


def _timed(title: str, points: Sequence[tuple[float, float | None]], target: float | None) -> str:
    scaled = [(at, None if value is None else value * 1000) for at, value in points]
    return plot(title, "ms, mean", [Line("seen", scaled, _COLOURS[0])], mark=("target", target * 1000) if target else None)


def _gpus(decision: Decision) -> int:
    return sum((seen.ready + seen.starting + seen.draining) * seen.gpus_per_replica for seen in decision.fleet.values())


def _thinned(decisions: Sequence[Decision]) -> Sequence[Decision]:
    every = max(1, len(decisions) // _POINTS)
    return [*decisions[:-1:every], decisions[-1]]
