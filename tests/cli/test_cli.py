"""The command line: what is printed, where, and with which exit code."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs
import pytest

from dynamo_core import __version__
from dynamo_core.cli import main
from dynamo_core.config import load
from dynamo_core.plugins import Component, Plugins

GOOD = 'discovery = "file"\n[router]\nuse = "least-loaded"\n[[workers]]\ncount = 2\nengine = "echo"\n'
OURS = [c for c in Plugins.load().of_kind("cli").values() if c.plugin.name == "builtin"]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("DYNAMO_"):
            monkeypatch.delenv(name)


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    (tmp_path / "stack.toml").write_text(GOOD)
    return tmp_path / "stack.toml"


def dynamo(*words: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    run = [sys.executable, "-c", "import sys; from dynamo_core.cli import main; sys.exit(main())", *words]
    return subprocess.run(run, capture_output=True, text=True, env={**os.environ, **(env or {})}, cwd=cwd, timeout=120, check=False)


# ------------------------------------------------------------------ the shell


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(f"  {c.name} " in out for c in OURS)


@pytest.mark.parametrize("component", OURS, ids=lambda c: c.name)
def test_every_command_imports_and_has_help(component: Component, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*component.name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"Usage: dynamo {component.name}" in out
    assert component.load().__doc__


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chekc"], "did you mean `dynamo check`?"),
        (["plugn"], "did you mean `dynamo plugin"),
        (["config", "shw"], "did you mean `dynamo config show`?"),
        (["--hlep"], "did you mean `dynamo --help`?"),
        (["zzzzzz"], "`dynamo --help` lists them all"),
        (["version", "--jsn"], "Did you mean --json?"),
        (["version", "more"], "hint: dynamo version --help"),
        (["check", "a.toml", "--set"], "--set requires an argument"),
        (["config"], "config show"),
        (["plugin"], "plugin new"),
        (["explain"], "ID"),
    ],
)
def test_a_misspelled_command_or_flag_is_exit_2_with_a_suggestion(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_the_help_of_a_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--help"]) == 0
    assert "dynamo config show" in capsys.readouterr().out


def test_a_configuration_error_is_text_on_stderr_and_a_traceback_only_with_debug(tmp_path: Path) -> None:
    (tmp_path / "stack.toml").write_text("[frontend]\nprot = 1\n")
    plain = dynamo("config", "show", "stack.toml", cwd=tmp_path)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr == "stack.toml:2: [frontend] has no key 'prot'\n     2 | prot = 1\n  hint: did you mean 'port'?\n"
    debugged = dynamo("--debug", "config", "show", "stack.toml", cwd=tmp_path)
    assert debugged.returncode == 2
    assert "Traceback" in debugged.stderr


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    program = f"{sys.executable} -c 'import sys; sys.stdin.read(); from dynamo_core.cli import main; sys.exit(main([\"config\", \"schema\"]))'"
    # The reader is gone before the writer is allowed to begin.
    shell = f"mkfifo gate; (sleep 0.5; : > gate) & {program} < gate | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_an_interrupt_is_exit_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(10)

    monkeypatch.setattr("dynamo_core.cli.version.version", interrupted)
    assert main(["version"]) == 130


def test_a_command_may_return_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_core.cli.version.version", lambda: 7)
    assert main(["version"]) == 7


def test_help_with_twenty_plugins_imports_none_of_the_slow_modules(tmp_path: Path) -> None:
    for n in range(20):
        package = tmp_path / f"fake{n}"
        package.mkdir()
        registered = "".join(f"    registry.{kind}('fake{n}', 'fake{n}.heavy:X', summary='fake')\n" for kind in ("cli", "scorer", "engine"))
        (package / "__init__.py").write_text(f"from dynamo_core import hookimpl\n@hookimpl\ndef dynamo_register(registry):\n{registered}")
        (package / "heavy.py").write_text("raise AssertionError('imported')")
        info = tmp_path / f"fake{n}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fake{n}\nVersion: 1.0\nRequires-Dist: attrs\n")
        (info / "entry_points.txt").write_text(f"[dynamo]\nfake{n} = fake{n}\n")
    code = "import sys; from dynamo_core.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=60, check=True)
    assert all(f"  fake{n} " in done.stdout for n in range(20))
    assert "(fake7 1.0)" in done.stdout
    loaded = set(done.stderr.split())
    assert "fake3" in loaded
    assert not loaded & {"cyclopts", "rich", "numpy", "msgspec", "asyncio", "httpx", "ruamel.yaml", "cattrs", "fake3.heavy", "dynamo_core.config"}


def test_a_command_of_a_plugin_runs(tmp_path: Path) -> None:
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "__init__.py").write_text(
        "from dynamo_core import hookimpl\n@hookimpl\ndef dynamo_register(registry):\n    registry.cli('acme', 'acme.go:go', summary='go there')\n"
    )
    (tmp_path / "acme" / "go.py").write_text("def go(where: str, *, fast: bool = False):\n    'Go there.'\n    print(where, fast)\n    return 3\n")
    (tmp_path / "acme-1.0.dist-info").mkdir()
    (tmp_path / "acme-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (tmp_path / "acme-1.0.dist-info" / "entry_points.txt").write_text("[dynamo]\nacme = acme\n")
    done = dynamo("acme", "home", "--fast", env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (3, "home True\n")


# ------------------------------------------------------------------ commands


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"dynamo-core {__version__} (Python")
    assert main(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dynamo-core"] == __version__


def test_check_of_a_good_stack_sums_it_up_and_says_who_provides_its_facts(stack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(stack)]) == 0
    out = capsys.readouterr().out
    assert "The configuration is good" in out
    assert "2 x backend (echo)" in out
    assert "needs bookings.in_flight, from bookings" in out


def test_check_reports_everything_at_once(stack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stack.write_text(GOOD + "rolle = 1\n[frontend]\nport = -1\n")
    assert main(["check", str(stack), "--set", "router.sed=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{stack}:7" in captured.err
    assert f"{stack}:9" in captured.err
    assert "did you mean 'seed'?" in captured.err
    assert captured.err.endswith("3 problems\n")


def test_check_warns_of_what_is_probably_a_mistake(stack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(stack), "--set", 'plugins.disabled=["dynamo-sym", "sim"]', "--set", "discovery=memory"]) == 0
    err = capsys.readouterr().err
    assert "warning: plugins.disabled: no plugin 'dynamo-sym' is installed; did you mean 'dynamo-sim'?" in err
    assert "warning: discovery 'memory' stays inside one process" in err
    assert err.count("warning") == 2


def test_check_as_json(stack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(stack), "--json"]) == 0
    good = json.loads(capsys.readouterr().out)
    assert good["ok"] is True
    assert good["routing"]["router"]["bookings.in_flight"] == "bookings"
    assert main(["check", str(stack), "--json", "--set", "nonsense=1"]) == 2
    bad = json.loads(capsys.readouterr().out)
    assert bad["ok"] is False
    assert bad["problems"][0]["where"] == "--set nonsense"


def test_config_show_prints_what_loads_to_the_same(stack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", str(stack), "--set", "router.seed=4"]) == 0
    shown = load(text=capsys.readouterr().out, environ={})
    wanted = load(stack, overrides=["router.seed=4"], environ={})
    assert shown.router.seed == 4
    assert attrs.evolve(shown.workers[0], engine=wanted.workers[0].engine) == wanted.workers[0]
    assert shown.workers[0].engine.name == "echo"


def test_config_show_with_origins(stack: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAMO__ROUTER__SEED", "4")
    assert main(["config", "show", str(stack), "router", "--origin"]) == 0
    rows = [line.split(None, 2) for line in capsys.readouterr().out.splitlines()]
    assert ["router.use.use", '"least-loaded"', f"{stack}:3"] in rows
    assert ["router.seed", "4", "environment variable DYNAMO__ROUTER__SEED"] in rows
    assert all(row[0].startswith("router") for row in rows)
    assert main(["config", "show", str(stack), "workers.0", "--origin", "--format", "json"]) == 0
    assert {"name": "workers[0].count", "value": 2, "origin": f"{stack}:5"} in json.loads(capsys.readouterr().out)


def test_config_show_without_a_file_and_with_an_unknown_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "frontend.port", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"frontend": {"port": 8000}}
    assert main(["config", "show", "frontend.prot"]) == 2
    assert "there is no setting 'frontend.prot'" in capsys.readouterr().err


def test_plugins_lists_by_plugin_and_imports_no_component() -> None:
    code = "import sys; from dynamo_core.cli import main; main(['plugins']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert f"dynamo-core {__version__}  (builtin, " in done.stdout
    assert "scorer           turn, load" in done.stdout
    loaded = set(done.stderr.split())
    targets = {c.target.partition(":")[0] for c in Plugins.load().components.values() if c.kind != "cli"}
    assert not loaded & targets


def test_plugins_of_one_kind_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plugins", "--kind", "picker", "--json"])
    (core,) = [p for p in json.loads(capsys.readouterr().out) if p["name"] == "builtin"]
    assert {"best", "softmax"} <= {c["name"] for c in core["components"]}
    assert {c["kind"] for c in core["components"]} == {"picker"}
    assert main(["plugins", "--kind", "pickr"]) == 2


def test_a_plugin_that_was_left_out_is_shown_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "bad-1.0.dist-info").mkdir()
    (tmp_path / "bad-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    (tmp_path / "bad-1.0.dist-info" / "entry_points.txt").write_text("[dynamo]\nbad = no_such_package\n")
    done = dynamo("plugins", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "LEFT OUT: ModuleNotFoundError: No module named 'no_such_package'" in done.stdout
    disabled = dynamo("plugins", env={"PYTHONPATH": str(tmp_path), "DYNAMO_DISABLED_PLUGINS": "bad"})
    assert "LEFT OUT: disabled by configuration" in disabled.stdout


def test_summaries_of_commands_are_sentences_without_their_first_capital() -> None:
    assert all(c.summary and not c.summary.endswith(".") and c.summary[0].islower() for c in OURS)
    assert importlib.import_module("dynamo_core.cli.commands")
