"""The tables of docs/reliability.md. People write the text around the marks, and the commands what is between them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs

from benchmarks.chaos.faults import FAULTS
from benchmarks.chaos.stage import Shape
from benchmarks.chaos.trial import Verdict

COLUMNS: tuple[tuple[str, str], ...] = (
    ("fault", "**{fault}**: {what}"),
    ("requests", "{requests}"),
    ("failed", "{failed}"),
    ("broken", "{broken}"),
    ("lost / doubled tokens", "{lost} / {doubled}"),
    ("moved", "{moved}"),
    ("longest pause", "{pause:.1f} s"),
    ("usual rate after", "{steady}"),
    ("whole after", "{whole}"),
    ("stale choices", "{stale}"),
    ("bookings left", "{booked:g}"),
    ("memory", "{grown:+.0f} MB"),
    ("kept", "{kept}"),
)


def together(path: Path, verdicts: Sequence[Verdict]) -> list[Verdict]:
    """These verdicts, and those that the file has of other faults; the file has them all afterwards."""
    known: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    by_name = {entry["fault"]: Verdict(**entry) for entry in known} | {verdict.fault: verdict for verdict in verdicts}
    order = {fault.name: number for number, fault in enumerate(FAULTS)}
    found = sorted((verdict for verdict in by_name.values() if verdict.fault in order), key=lambda verdict: order[verdict.fault])
    path.write_text(json.dumps([attrs.asdict(verdict) for verdict in found], indent=1) + "\n")
    return found


def write_faults(page: Path, verdicts: Sequence[Verdict], left_out: Mapping[str, str], shape: Shape, seed: int) -> None:
    fleet = f"{shape.workers} workers, {shape.frontends} frontends, {shape.streams} streams at once"
    lines = [f"{fleet}, {shape.tokens} tokens each, one every {shape.pace_ms:g} ms; seed {seed}; {machine()}.", ""]
    lines += table([name for name, _ in COLUMNS], [[cell.format(**_cells(verdict)) for _, cell in COLUMNS] for verdict in verdicts])
    lines += ["", *(f"Not tried: {field}, because {why}." for field, why in left_out.items())]
    replace(page, "faults", "\n".join(lines))


def _cells(verdict: Verdict) -> dict[str, Any]:
    def seconds(value: float | None) -> str:
        return "never" if value is None else f"{value:.1f} s"

    kept = "yes" if not verdict.violations else "no: " + "; ".join(verdict.violations)
    return attrs.asdict(verdict) | {"steady": seconds(verdict.steady), "whole": seconds(verdict.whole), "kept": kept}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def machine() -> str:
    return f"{os.cpu_count()} cores ({platform.machine()}, {platform.system()} {platform.release()}), {datetime.now(UTC):%Y-%m-%d}"


def replace(page: Path, part: str, text: str) -> None:
    """Put `text` between the marks of `part`."""
    before, start, rest = page.read_text().partition(f"<!-- {part}: written by a command -->\n")
    _, end, after = rest.partition(f"<!-- end of {part} -->")
    if not start or not end:
        raise ValueError(f"{page} has no marks for {part}")
    page.write_text(f"{before}{start}\n{text.strip()}\n\n{end}{after}")
