"""One file for all machines: each role needs the plugins and the secrets of its own part alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

STACK = """
discovery = {{ use = "file", path = "{folder}/discovery" }}
[frontend]
port = 0
{more}
[[workers]]
engine = {{ use = "{first}" }}
[[workers]]
engine = {{ use = "{second}" }}
"""
FRONTENDS_OWN = """
[frontend.authenticator]
use = "api-keys"
file = "/no/such/keys.json"
[frontend.admin]
key = "env:NO_SUCH_ADMIN_KEY"
[router]
use = "no-such-policy"
"""


def stack(folder: Path, *, first: str = "echo", second: str = "echo", more: str = "") -> Path:
    path = folder / "stack.toml"
    path.write_text(STACK.format(folder=folder, first=first, second=second, more=more))
    return path


def run(*words: str, until: str = "") -> str:
    """What `dynamo` says until it says `until` or ends by itself; its exit code is the last line."""
    environ = {**os.environ, "DYNAMO__OBSERVABILITY__LOG_FORMAT": "json"}
    process = subprocess.Popen([sys.executable, "-m", "dynamo_core.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if until and until in line:
                process.send_signal(signal.SIGTERM)
        return f"{said}{process.wait(60)}"
    finally:
        process.kill()
        process.wait()


def test_a_frontend_needs_no_plugin_of_an_engine(tmp_path: Path) -> None:
    said = run("frontend", str(stack(tmp_path, first="not-installed-here")), until="listening on")
    assert "listening on http://" in said, said
    assert said.endswith("0")


@pytest.mark.parametrize("choice", [["--index", "1"], ["--engine", "echo"]])
def test_a_worker_needs_nothing_of_the_frontend_and_no_other_engine(tmp_path: Path, choice: list[str]) -> None:
    said = run("worker", str(stack(tmp_path, first="not-installed-here", more=FRONTENDS_OWN)), *choice, until="worker backend: canary")
    assert said.endswith("0"), said


def test_what_a_role_needs_itself_is_checked_before_it_starts(tmp_path: Path) -> None:
    said = run("frontend", str(stack(tmp_path, more=FRONTENDS_OWN)))
    assert "there is no such file of API keys" in said
    assert "NO_SUCH_ADMIN_KEY is not set" in said
    assert "no installed plugin provides policy 'no-such-policy'" in said
    assert said.endswith("2")
    for words in (["--index", "1"], ["--engine", "not-installed-here"]):
        said = run("worker", str(stack(tmp_path, second="not-installed-here")), *words)
        assert "no installed plugin provides engine 'not-installed-here'" in said
        assert said.endswith("2")


def test_a_key_that_no_part_has_is_an_error_for_every_role(tmp_path: Path) -> None:
    path = stack(tmp_path, more="[router]\ntemperatur = 1\n")
    for role in ("frontend", "worker"):
        said = run(role, str(path))
        assert "did you mean 'temperature'?" in said
        assert said.endswith("2")


def test_check_looks_at_every_part(tmp_path: Path) -> None:
    said = run("check", str(stack(tmp_path, first="not-installed-here", more=FRONTENDS_OWN)))
    assert "4 problems" in said
