"""`dynamo up` where frontends that others have started serve the same fleet."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from dynamo_core.testing.servers import free_port


def test_it_names_its_own_frontend_and_waits_for_that_one(tmp_path: Path) -> None:
    stack = tmp_path / "stack.toml"
    stack.write_text(f'discovery = {{ use = "file", path = "{tmp_path}/discovery" }}\nfrontend = {{ port = {free_port()} }}\n[[workers]]\nengine = "echo"\n')
    dynamo = [sys.executable, "-m", "dynamo_core.cli"]
    environ = {**os.environ, "DYNAMO__OBSERVABILITY__LOG_FORMAT": "json"}
    others = [subprocess.Popen([*dynamo, "frontend", str(stack), "--port", "0"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
              for _ in range(3)]
    up = None
    try:
        for other in others:
            assert other.stderr is not None
            assert any("listening on" in line for line in other.stderr)
        up = subprocess.Popen([*dynamo, "up", str(stack), "--quiet", "--timeout", "60"], stderr=subprocess.PIPE, text=True, env=environ)
        assert up.stderr is not None
        said = next(line for line in up.stderr if line.startswith(("ready", "dynamo:", "the stack")))
        port = re.search(r"port = (\d+)", stack.read_text())
        assert port is not None
        assert said == f"ready: 1 workers behind http://127.0.0.1:{port[1]}\n"
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 0
    finally:
        for process in (*others, *([up] if up else [])):
            process.kill()
            process.communicate()
