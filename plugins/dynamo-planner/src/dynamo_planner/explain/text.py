"""One decision as text."""

from __future__ import annotations

import time
from collections.abc import Iterator

from dynamo_planner.record import Decision


def explain(decision: Decision) -> str:
    """Why so many replicas: what was seen, what was expected, who wanted what, what stood in the way, what came of it."""
    return "\n".join(_lines(decision))


def _lines(d: Decision) -> Iterator[str]:
    yield f"decision {d.number}, {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(d.at))}: {d.action}{f' ({d.result})' if d.result else ''}"
    if d.missing:
        yield "  missing, so nothing was decided:"
        yield from (f"    {part}" for part in d.missing)
    if (load := d.load) is not None:
        timed = [f"{name} {value * 1000:.0f} ms" for name, value in (("TTFT", load.ttft), ("ITL", load.itl)) if value is not None]
        sizes = f" of {load.prompt_tokens:.0f} + {load.output_tokens:.0f} tokens" if load.prompt_tokens else ""
        held = f", {load.held:.0f} held for a cold model" if load.held else ""
        yield f"  seen      {load.rate:.3g} requests/s{sizes}, {load.in_progress:.0f} in progress{held}{''.join(f', {t}' for t in timed)}"
    for role, seen in d.fleet.items():
        more = [f"{count} {what}" for count, what in ((seen.starting, "starting"), (seen.draining, "draining"), (seen.reducible, "that never start")) if count]
        yield f"  running   {role}: {seen.ready} ready of {seen.desired}{''.join(f', {m}' for m in more)}, {seen.gpus_per_replica} GPUs each"
    if (f := d.forecast) is not None:
        yield f"  expected  {f.rate[0]:.3g} requests/s ({f.rate[1]:.3g} to {f.rate[2]:.3g}) within {f.horizon:.0f} s, by {f.by}"
    if d.performance:
        yield f"  engine    {d.performance}"
    for proposal in d.proposals:
        for role, count in proposal.targets.items():
            yield f"  proposal  {proposal.by}: {role} {proposal.kind.replace('_', ' ')} {count}; {proposal.why.get(role, '')}"
    if d.silent:
        yield f"  silent    {d.silent}"
    if d.wanted:
        yield f"  wanted    {_targets(d.wanted)}"
    for said in d.constraints:
        yield f"  held back {said.by}: {said.role} {said.before} -> {said.after}; {said.why}"
    if d.targets:
        yield f"  target    {_targets(d.targets)}, {d.gpus} GPUs"
    yield from (f"  stuck     {what}" for what in d.stuck)


def _targets(targets: dict[str, int]) -> str:
    return ", ".join(f"{role} {count}" for role, count in targets.items())
