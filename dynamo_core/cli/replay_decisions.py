from __future__ import annotations

import json as jsonlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from dynamo_core.cards import Role
from dynamo_core.cli.options import Json
from dynamo_core.config import load
from dynamo_core.errors import ConfigError, Problem
from dynamo_core.plugins import Plugins
from dynamo_core.routing.decide import Stack
from dynamo_core.routing.facts import OVERLAP_TOKENS
from dynamo_core.routing.record import Decision
from dynamo_core.routing.stack import build_stack


def replay_decisions(
    file: Annotated[Path, Parameter(name="FILE", help="Decision records, as `router.record` writes them; JSON lines.")],
    /,
    *,
    stack: Annotated[Path, Parameter(help="A configuration whose [router] decides again.")],
    max_changed: Annotated[str | None, Parameter(help="Fail when more decisions change than this: `5%`, or a number.")] = None,
    show: Annotated[int, Parameter(help="Decisions to list, of those that change.")] = 20,
    json: Json = False,
) -> int:
    """Decide recorded requests again by another stack, exactly, and list what changes."""
    plugins = Plugins.load()
    config = load(stack, plugins=plugins)
    stacks: dict[Role, Stack] = {}
    seen, same, lost = 0, 0, 0
    gain = 0
    faults: Counter[str] = Counter()
    changed: list[tuple[Decision, str]] = []
    for decision in _read(file):
        role = decision.request.role
        if role not in stacks:
            stacks[role] = build_stack(config.router, plugins, role=role)
        choice = decision.recompute(stacks[role])
        seen += 1
        faults.update(policy for policy, _ in choice.faults)
        if choice.worker == decision.worker:
            same += 1
            continue
        lost += choice.worker is None
        names = dict(zip(decision.workers, decision.labels, strict=True))
        if choice.worker is not None and (overlaps := decision.columns.get(OVERLAP_TOKENS)) is not None:
            gain += int(overlaps[list(decision.workers).index(choice.worker)]) - decision.overlap_tokens
        changed.append((decision, "nobody" if choice.worker is None else names[choice.worker]))
    report: dict[str, Any] = {
        "decisions": seen, "same": same, "changed": len(changed), "nobody": lost, "overlap_gain_tokens": gain, "faults": dict(faults),
        "changes": [{"decision": d.id, "request": d.request.id, "was": _was(d), "now": now, "margin": d.margin} for d, now in changed[:show]],
    }
    if json:
        print(jsonlib.dumps(report, indent=2))
    else:
        _print(report)
    if max_changed is not None and len(changed) > _limit(max_changed, seen):
        print(f"{len(changed)} of {seen} decisions change, more than {max_changed}")
        return 1
    return 0


def _was(decision: Decision) -> str:
    return "nobody" if decision.worker is None else dict(zip(decision.workers, decision.labels, strict=True))[decision.worker]


def _read(file: Path) -> Iterator[Decision]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield Decision.from_json(line)
                    except ValueError as e:
                        raise ConfigError(Problem(str(e), f"{file}:{number}", line[:120].decode("utf-8", "replace"))) from e
    except OSError as e:
        raise ConfigError(Problem(f"it cannot be read: {e.strerror}", str(file))) from e


def _limit(text: str, of: int) -> float:
    try:
        return of * float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as e:
        raise ConfigError(Problem(f"--max-changed {text!r} is neither a number nor a percentage", remedy="write 5% or 12")) from e


def _print(report: dict[str, Any]) -> None:
    seen, changed = report["decisions"], report["changed"]
    share = changed / seen if seen else 0.0
    print(f"{seen} decisions: {report['same']} stay, {changed} change ({share:.1%}), of which {report['nobody']} find nobody")
    print(f"cached prompt tokens gained by the changes: {report['overlap_gain_tokens']}")
    for policy, count in report["faults"].items():
        print(f"skipped: {policy} in {count} decisions")
    for change in report["changes"]:
        print(f"  {change['decision']:<16} {change['request']:<20} {change['was']} -> {change['now']}")
