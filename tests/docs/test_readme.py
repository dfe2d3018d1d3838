"""What the README shows works: its stack loads, its policy keeps the contract, its table is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dynamo_core.cli import main
from dynamo_core.config import load_with_plugins
from dynamo_core.contracts import ScorerContract
from dynamo_core.plugins import Plugins
from dynamo_core.routing.stack import build_stack

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.S)
    assert found is not None
    return found[1]


class TestTheFirstPlugin(ScorerContract):
    @pytest.fixture
    def scorer(self):
        namespace: dict[str, type] = {}
        exec(block("python"), namespace)
        return namespace["ShortestQueue"]()


def test_the_stack_of_the_readme_loads() -> None:
    config, plugins = load_with_plugins(text=block("toml"), environ={})
    assert build_stack(config.router, plugins)


def test_the_table_names_every_component_that_is_built_in() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)$", README, re.M))
    for kind, row in rows.items():
        missing = [c.name for c in Plugins.load().of_kind(kind).values() if c.plugin.name == "builtin" and f"`{c.name}`" not in row]
        assert missing == [], f"{kind}: {missing}"


def test_the_folder_that_the_readme_installs_is_the_one_that_the_command_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(r"`dynamo (plugin new scorer \S+)`.*?`pip install \./(\S+)`", README, re.S)
    assert found is not None
    monkeypatch.chdir(tmp_path)
    assert main(found[1].split()) == 0
    assert (tmp_path / found[2] / "pyproject.toml").exists()


def test_every_link_of_the_documentation_leads_somewhere() -> None:
    broken = []
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/README.md"), *ROOT.glob("plugins/routers/*/README.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_every_make_target_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make (\w+)", README)) <= targets
