"""Every hook has a section whose heading is its signature, with an example that runs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pluggy
import pytest

from dynamo_core import hookspecs

PAGE = Path(__file__).parents[2] / "docs" / "hooks.md"


def hooks() -> dict[str, str]:
    """Name and heading of every hook."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return {name: f"## {name}({', '.join(inspect.signature(getattr(hookspecs, name)).parameters)})" for name in vars(manager.hook) if name.startswith("dynamo_")}


def section(name: str) -> str:
    return re.split(r"^## ", PAGE.read_text(), flags=re.M)[[line.startswith(name + "(") for line in re.split(r"^## ", PAGE.read_text(), flags=re.M)].index(True)]


@pytest.mark.parametrize("name", hooks())
def test_each_hook_has_a_section_with_its_signature(name: str) -> None:
    assert hooks()[name] in PAGE.read_text().splitlines()


@pytest.mark.parametrize("name", hooks())
def test_each_hook_says_where_it_runs(name: str) -> None:
    assert "Runs in:" in section(name)
    assert "Processes:" in (getattr(hookspecs, name).__doc__ or "")


@pytest.mark.parametrize("name", hooks())
def test_each_example_is_a_plugin_that_registers(name: str) -> None:
    code = re.search(r"```python\n(.*?)```", section(name), re.S)
    assert code is not None
    namespace: dict[str, object] = {}
    exec(compile(code[1], f"{PAGE.name}:{name}", "exec"), namespace)
    plugin = type("Plugin", (), {key: staticmethod(value) for key, value in namespace.items() if key.startswith("dynamo_")})
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin())
    manager.check_pending()
    assert getattr(manager.hook, name).get_hookimpls()


def test_no_section_is_about_a_hook_that_does_not_exist() -> None:
    assert set(re.findall(r"^## (dynamo_\w+)", PAGE.read_text(), re.M)) == set(hooks())
