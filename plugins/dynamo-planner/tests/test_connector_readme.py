"""What the README shows of connectors loads."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest

from dynamo_core.config import load_with_plugins
from dynamo_planner.connectors.local import LocalConnector
from dynamo_planner.connectors.virtual import VirtualConnector

README = (Path(__file__).parents[1] / "README.md").read_text()
OURS = README[README.index("## Connectors") :]


@pytest.mark.parametrize("text", re.findall(r"```toml\n(.*?)```", OURS, re.S), ids=lambda text: re.sub(r"\W+", "-", text[:40]))
def test_each_sample_of_the_readme_loads(text: str) -> None:
    config, _ = load_with_plugins(text=text, environ={"CHAT_PLANNER_TOKEN": "chat-" + "x" * 20, "BATCH_PLANNER_TOKEN": "batch-" + "y" * 20})
    assert config.planner is not None


@pytest.mark.parametrize("connector", [LocalConnector, VirtualConnector])
def test_the_readme_names_every_option(connector: type) -> None:
    section = OURS[OURS.index(f"### `{connector.__name__.removesuffix('Connector').lower()}`") :]
    for field in attrs.fields(connector):
        assert not field.init or f"`{field.name}`" in section, f"{connector.__name__}.{field.name} is not described"
