"""The tables of docs/reliability.md. Text around the marks is written by people, what is between them by the commands."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs

from benchmarks.chaos.stage import Shape
from benchmarks.chaos.trial import Verdict


def plain(verdict: Verdict) -> dict[str, Any]:
    return attrs.asdict(verdict)


def replace(page: Path, part: str, text: str) -> None:
    """Put `text` between the marks of `part`."""
    before, start, rest = page.read_text().partition(f"<!-- {part}: written by a command -->\n")
    _, end, after = rest.partition(f"<!-- end of {part} -->")
    if not start or not end:
        raise ValueError(f"{page} has no marks for {part}")
    page.write_text(f"{before}{start}{text.rstrip()}\n{end}{after}")


def machine() -> str:
    return f"{os.cpu_count()} cores ({platform.machine()}, {platform.system()} {platform.release()}), {datetime.now(UTC):%Y-%m-%d}"


def write_faults(page: Path, verdicts: Sequence[Verdict], left_out: Mapping[str, str], shape: Shape, seed: int) -> None:
    lines = [
        f"{shape.workers} workers, {shape.frontends} frontends, {shape.streams} streams at once, {shape.tokens} tokens each, one every {shape.pace_ms:g} ms; seed {seed}; {machine()}.",
        "",
        "| fault | requests | failed | broken | lost / doubled tokens | moved | longest pause | usual rate after | whole after | stale choices | bookings left | memory | kept |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for v in verdicts:
        lines.append(
            f"| **{v.fault}**: {v.what} | {v.requests} | {v.failed} | {v.broken} | {v.lost} / {v.doubled} | {v.moved} | {v.pause:.1f} s | "
            f"{_seconds(v.steady)} | {_seconds(v.whole)} | {v.stale} | {v.booked:g} | {v.grown:+.0f} MB | {'yes' if not v.violations else 'no: ' + '; '.join(v.violations)} |"
        )
    lines += ["", *(f"Not tried: {field}, because {why}." for field, why in left_out.items())]
    replace(page, "faults", "\n".join(lines))


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f} s"
