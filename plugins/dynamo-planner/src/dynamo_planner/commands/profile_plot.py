# ruff: noqa: T201
from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def profile_plot(
    file: Annotated[Path, Parameter(help="A profile: ours, or one of NVIDIA Dynamo's (.npz, a directory).")], /, *,
    out: Annotated[Path, Parameter(help="The picture: .svg, .png or .pdf.")] = Path("profile.svg"),
) -> int:
    """Draw a profile: points as measured, lines as the planner believes them."""
    from dynamo_planner.performance.profile import load
    from dynamo_planner.profiling.plot import draw

    draw(load(file), out)
    print(out)
    return 0
