"""A scaffolded plugin passes its contract tests as generated, and `dynamo plugin check` says how far it has come."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dynamo_core.cli import main
from dynamo_core.cli.scaffold import SCAFFOLDS, project
from dynamo_core.plugins import KINDS

POLICIES = ("scorer", "filter", "picker")
OTHERS = tuple(kind for kind in SCAFFOLDS if kind not in POLICIES)


def make(kind: str, where: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    name = f"my-{kind.replace('_', '-')}"
    assert main(["plugin", "new", kind, name, "--dir", str(where)]) == 0
    capsys.readouterr()
    return where / f"dynamo-{name}"


def installed(*projects: Path) -> dict[str, str]:
    """An environment in which the projects count as installed, as after `pip install -e`."""
    for root in projects:
        about = tomllib.loads((root / "pyproject.toml").read_text())["project"]
        info = root / "src" / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
        info.mkdir(exist_ok=True)
        requires = "".join(f"Requires-Dist: {r}\n" for r in about["dependencies"])
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n{requires}\n")
        (info / "entry_points.txt").write_text("[dynamo]\n" + "".join(f"{k} = {v}\n" for k, v in about["entry-points"]["dynamo"].items()))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(root / "src") for root in projects)}


def dynamo(*words: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-c", "import sys; from dynamo_core.cli import main; sys.exit(main())", *words]
    return subprocess.run(run, capture_output=True, text=True, env=env, cwd=cwd, timeout=300, check=False)


def run_tests(*projects: Path) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(projects[0] / "pyproject.toml"), *(str(p / "tests") for p in projects)]
    return subprocess.run(run, capture_output=True, text=True, env=installed(*projects), cwd=projects[0], timeout=300, check=False)


@pytest.mark.slow
def test_policies_pass_their_contract_as_generated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run_tests(*(make(kind, tmp_path, capsys) for kind in POLICIES))
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_engines_stores_and_planes_pass_their_contract_as_generated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run_tests(*(make(kind, tmp_path, capsys) for kind in OTHERS))
    assert done.returncode == 0, done.stdout


def test_the_sample_stack_of_every_kind_is_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    projects = [make(kind, tmp_path, capsys) for kind in SCAFFOLDS]
    env = installed(*projects)
    text = "\n".join(f"check(Path({str(root / 'stack.toml')!r}), plugins=plugins)," for root in projects)
    imports = "from pathlib import Path\nfrom dynamo_core.config import check\nfrom dynamo_core.plugins import Plugins"
    code = f"{imports}\nplugins = Plugins.load()\nprint([{text}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120, check=True)
    assert done.stdout.strip() == str([[]] * len(projects))


def test_plugin_check_shows_the_ladder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make("scorer", tmp_path, capsys)
    done = dynamo("plugin", "check", str(root), env=installed(root), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bronze  ok   passes its contract tests" in done.stdout
    assert "gold    todo stable: my-scorer (alpha)" in done.stdout


def test_plugin_check_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make("scorer", tmp_path, capsys)
    project_file = root / "pyproject.toml"
    project_file.write_text(project_file.read_text().replace(",<1", ""))
    (root / "README.md").write_text("Nothing to read.")
    (root / "tests" / "test_contract.py").unlink()
    light = root / "src" / "dynamo_my_scorer" / "__init__.py"
    light.write_text(light.read_text() + "\nfrom dynamo_my_scorer import policy\n")
    done = dynamo("plugin", "check", str(root), env=installed(root), cwd=tmp_path)
    assert done.returncode == 1
    assert "todo entry point imports nothing heavy" in done.stdout
    assert "todo passes its contract tests: no test inherits a contract" in done.stdout
    assert "no upper bound" in done.stdout
    assert "it does not mention my-scorer" in done.stdout


def test_plugin_check_of_what_is_not_installed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make("picker", tmp_path, capsys)
    assert main(["plugin", "check", str(root)]) == 2
    assert "pip install -e" in capsys.readouterr().err
    assert main(["plugin", "check", "no-such-plugin"]) == 2


@pytest.mark.parametrize("name", ["My-Router", "my_router", "1st", "-x", "a--b", "class", "ü", "a/b"])
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugin", "new", "scorer", "--dir", str(tmp_path), "--", name]) == 2
    assert "is not a name for a plugin" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make("scorer", tmp_path, capsys)
    (root / "README.md").write_text("mine")
    assert main(["plugin", "new", "scorer", "my-scorer", "--dir", str(tmp_path)]) == 2
    assert (root / "README.md").read_text() == "mine"


def test_an_unknown_kind_lists_the_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugin", "new", "scorrer", "x"]) == 2
    assert "scorer, filter, picker" in capsys.readouterr().err


def test_scaffolds_are_of_kinds_that_exist_and_leave_nothing_to_fill_in() -> None:
    assert set(SCAFFOLDS) <= set(KINDS)
    for kind in SCAFFOLDS:
        for path, content in project(kind, "one-two").items():
            assert "@" not in content.replace("@attrs", "").replace("@pytest", "").replace("@hookimpl", ""), path
            if path.endswith(".py"):
                compile(content, path, "exec")
            if path.endswith(".toml"):
                tomllib.loads(content)


@pytest.mark.slow
def test_a_generated_plugin_installs_into_a_clean_environment_and_is_selected_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make("scorer", tmp_path, capsys)
    core = Path(__file__).parents[2]
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=120)
    python = str(venv / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", f"{core}[testing]", str(root)], check=True, timeout=900)
    env = {key: value for key, value in os.environ.items() if not key.startswith(("DYNAMO", "PYTHON", "VIRTUAL_ENV"))}
    command = str(venv / "bin" / "dynamo")
    listed = subprocess.run([command, "plugins"], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=60, check=True)
    assert "scorer           my-scorer (alpha)" in listed.stdout
    checked = subprocess.run([command, "check", str(root / "stack.toml")], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=60, check=False)
    assert checked.returncode == 0, checked.stderr
    ladder = subprocess.run([command, "plugin", "check", str(root)], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120, check=False)
    assert ladder.returncode == 0, ladder.stdout
