"""Every sample stack passes `dynamo check`, and its routing stack is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_core.config import load_with_plugins
from dynamo_core.routing.stack import build_stack

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.mark.parametrize("path", sorted([*SAMPLES.glob("*.toml"), *SAMPLES.glob("*.yaml")]), ids=lambda path: path.name)
def test_each_sample_stack_loads(path: Path) -> None:
    config, plugins = load_with_plugins(path, environ={})
    assert build_stack(config.router, plugins).scorers
    assert path.read_text().startswith("# "), "a sample says in its first line what it is"
