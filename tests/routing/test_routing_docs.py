"""The pages on routing say what the program does, and the sample plugin in them works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

import dynamo_core.contracts
from dynamo_core.config import load
from dynamo_core.plugins import Plugin, Plugins, Registry
from dynamo_core.routing import contract, facts
from dynamo_core.routing.stack import build_stack

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples/plugins/dynamo-shortest-queue"
CONTRACT_PAGE = (ROOT / "docs/contracts/routing.md").read_text()
HOW_TO = (ROOT / "docs/how-to/write-a-routing-policy.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", HOW_TO, re.DOTALL)
FILES = {m[1]: text for _, text in BLOCKS if (m := re.match(r"# (\S+/\S+|\S+\.toml)\n", text))}


@pytest.fixture
def with_sample(monkeypatch):
    """The plugins, with the sample registered by its own hook."""
    monkeypatch.syspath_prepend(str(SAMPLE / "src"))
    import dynamo_shortest_queue

    registry = Registry()
    registry.plugin = Plugin("shortest-queue", "0.1.0", "dynamo-shortest-queue")
    dynamo_shortest_queue.dynamo_register(registry)
    found = Plugins.load()
    return attrs.evolve(found, components={**found.components, **registry.components})


def test_the_page_the_contract_and_the_tests_have_the_same_guarantees():
    tests = "".join((ROOT / "dynamo_core/contracts" / f"{kit}.py").read_text() for kit in ("scorer", "filter", "picker"))
    tests += (ROOT / "tests/routing/test_routing_stack.py").read_text()
    in_page = set(re.findall(r"^\*\*(R\d+)\.\*\*", CONTRACT_PAGE, re.MULTILINE))
    assert in_page == set(re.findall(r"^ *(R\d+)  ", contract.__doc__ or "", re.MULTILINE))
    assert in_page == {name.upper() for name in re.findall(r"def test_(r\d+)_", tests)}


def test_every_fact_of_the_core_is_in_the_page():
    for fact in facts.ALL:
        assert f"| `{fact.name}` | {fact.unit} | {fact.doc} |" in CONTRACT_PAGE


@pytest.mark.parametrize("path", [path for path in FILES if "/" in path])
def test_the_files_in_the_how_to_are_those_of_the_sample(path):
    assert FILES[path].partition("\n")[2].strip() == (SAMPLE / path).read_text().strip()


def test_the_project_file_in_the_how_to_is_part_of_the_samples():
    assert FILES["pyproject.toml"].partition("\n")[2].strip() in (SAMPLE / "pyproject.toml").read_text()


@pytest.mark.parametrize("text", [FILES["stack.toml"], *re.findall(r"```toml\n(.*?)```", (SAMPLE / "README.md").read_text(), re.DOTALL)])
def test_the_stacks_in_the_how_to_and_the_readme_build(text, tmp_path, with_sample):
    (tmp_path / "stack.toml").write_text(text)
    config = load(tmp_path / "stack.toml", plugins=with_sample)
    stack = build_stack(config.router, with_sample)
    ((scorer),) = stack.scorers
    assert scorer.describe() == {"use": "shortest-queue", "plugin": "dynamo-shortest-queue 0.1.0", "options": {"floor": 2}, "weight": 1.0, "scale": "unit"}
    assert {part.use for part in stack.providers} == {"fleet", "bookings", "engine-load"}


def test_the_samples_own_tests_pass_from_its_own_folder():
    environment = {**os.environ, "PYTHONPATH": str(SAMPLE / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=SAMPLE, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kits_are_imported_by_name_and_an_unknown_name_is_an_attribute_error():
    assert dynamo_core.contracts.ScorerContract.__module__ == "dynamo_core.contracts.scorer"
    with pytest.raises(AttributeError, match="NoSuchContract"):
        _ = dynamo_core.contracts.NoSuchContract


@pytest.mark.parametrize("missing", ["pytest", "hypothesis"])
def test_without_the_testing_extra_the_kits_say_what_to_install(missing):
    code = f"import sys; sys.modules[{missing!r}] = None\nimport dynamo_core.contracts"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert f"the conformance kits need {missing}: pip install 'dynamo-core[testing]'" in done.stderr


@pytest.mark.slow
def test_the_sample_is_built_and_installed_outside_the_workspace_and_selected_by_name(tmp_path):
    python = tmp_path / "env/bin/python"
    shutil.copytree(SAMPLE, tmp_path / "sample", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    (tmp_path / "stack.toml").write_text(FILES["stack.toml"])
    select = (
        "from pathlib import Path; from dynamo_core.config import load_with_plugins; from dynamo_core.routing.stack import build_stack;"
        "config, plugins = load_with_plugins(Path('stack.toml')); print(build_stack(config.router, plugins).scorers[0].plugin)"
    )
    for command in (
        [sys.executable, "-m", "venv", tmp_path / "env"],
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"{ROOT}[testing]", tmp_path / "sample"],
        [python, "-m", "pytest", "-q", "sample/tests"],
        [python, "-c", select],
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "dynamo-shortest-queue 0.1.0"
