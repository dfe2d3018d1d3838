"""`[[workers]] inside = true` with real processes: one gateway before plain engines, or a stack of both kinds of workers."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import httpx
import openai
import pytest

MEMORY = 'discovery = "memory"\nrequest_plane = "in-process"\nevent_plane = "in-process"\n'
ECHO = '[[workers]]\ncount = 2\ninside = true\nengine = { use = "echo" }\n'
PLUGIN = '''
import asyncio
from pathlib import Path

import attrs

from dynamo_core import hookimpl
from dynamo_core.engines.echo import EchoEngine


@attrs.define
class Elsewhere:
    """A client of a server, which runs while there is a file."""

    server: Path
    echo: EchoEngine = attrs.field(factory=lambda: EchoEngine(model="elsewhere"), init=False)
    watch: asyncio.Task | None = attrs.field(default=None, init=False)

    async def start(self, context):
        if not self.server.exists():
            raise ConnectionRefusedError("the server is not there")
        self.watch = asyncio.create_task(self._watch(context.died))
        return await self.echo.start(context)

    async def _watch(self, died):
        while self.server.exists():
            await asyncio.sleep(0.02)
        died("the server has gone")

    def generate(self, request, context):
        return self.echo.generate(request, context)

    def artifact(self, digest):
        return self.echo.artifact(digest)

    async def stop(self):
        if self.watch is not None:
            self.watch.cancel()
        await self.echo.stop()


@hookimpl
def dynamo_register(registry):
    registry.engine("elsewhere", "elsewhere:Elsewhere", summary="a server that comes and goes")
'''


def installed(folder: Path) -> None:
    (folder / "elsewhere.py").write_text(PLUGIN)
    info = folder / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dynamo]\nelsewhere = elsewhere\n")


@attrs.define
class Running:
    """A process of `dynamo`, and what it says."""

    process: subprocess.Popen[str]
    lines: list[str]
    url: str = ""

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def health(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/health", timeout=10).json()

    def serves(self) -> dict[str, int]:
        return {name: sum(worker["proven"] for worker in model["workers"]) for name, model in self.health()["models"].items()}

    def until(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, f"it did not come true; {self.text}"
            time.sleep(0.05)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)


@contextlib.contextmanager
def running(folder: Path, role: str, stack: str, says: str = r"listening on (http://[\d.:]+)") -> Iterator[Running]:
    """`dynamo ROLE` with this stack, once it has said where it listens."""
    path = folder / "stack.toml"
    path.write_text(stack)
    environment = {**os.environ, "PYTHONPATH": str(folder), "DYNAMO__OBSERVABILITY__LOG_FORMAT": "json"}
    process = subprocess.Popen([sys.executable, "-m", "dynamo_core.cli", role, str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
                               start_new_session=True)  # fmt: skip
    it = Running(process, [])
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: it.lines.extend(process.stdout))  # type: ignore[arg-type]
    reader.start()
    try:
        it.until(lambda: re.search(says, it.text) or process.poll() is not None)
        found = re.search(says, it.text)
        assert found, it.text
        it.url = found[1]
        yield it
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join()


def listeners(pid: int) -> int:
    """TCP sockets on which a process listens."""
    own = set[str]()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            own.add(os.readlink(fd))
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]]
    return sum(row[3] == "0A" and f"socket:[{row[9]}]" in own for row in rows)


def children(pid: int) -> list[str]:
    found = subprocess.run(["ps", "-ww", "-o", "args=", "--ppid", str(pid)], capture_output=True, text=True, check=False).stdout
    return [line for line in found.splitlines() if "dynamo_core.cli" in line]


def test_a_gateway_is_one_process_and_only_http_listens(tmp_path: Path) -> None:
    with running(tmp_path, "frontend", f"{MEMORY}frontend = {{ port = 0 }}\n{ECHO}") as gateway:
        gateway.until(lambda: gateway.serves() == {"echo": 2})
        assert listeners(gateway.process.pid) == 1
        assert children(gateway.process.pid) == []
        answer = gateway.client().completions.create(model="echo", prompt="hello", max_tokens=5)
        assert answer.choices[0].text == "hello"
        for _ in range(9):
            gateway.client().completions.create(model="echo", prompt="hello", max_tokens=5)
        scraped = httpx.get(f"{gateway.url}/metrics").text
        done = re.findall(r'^dynamo_component_requests_total\{.*worker="(backend-\d)"\} ([\d.]+)', scraped, re.MULTILINE)
        assert {name for name, _ in done} == {"backend-0", "backend-1"}
        assert sum(float(count) for _, count in done) == 10
        assert gateway.end() == 0
    assert "Traceback" not in gateway.text


@pytest.mark.slow
def test_a_stream_ends_well_when_the_gateway_is_told_to_end(tmp_path: Path) -> None:
    stack = f'{MEMORY}frontend = {{ port = 0 }}\n[[workers]]\ninside = true\nengine = {{ use = "echo", delay = 0.05 }}\n'
    with running(tmp_path, "frontend", stack) as gateway:
        gateway.until(lambda: gateway.serves() == {"echo": 1})
        stream = gateway.client().completions.create(model="echo", prompt="hello", max_tokens=40, stream=True)
        text = next(iter(stream)).choices[0].text
        gateway.process.send_signal(signal.SIGTERM)
        text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == "hello" * 8
        assert gateway.process.wait(60) == 0
    assert gateway.text.index("request finished") < gateway.text.index("worker backend-0 left discovery"), "the workers left before the streams had ended"


@pytest.mark.slow
def test_a_server_that_goes_takes_nobody_with_it_and_is_used_when_it_is_back(tmp_path: Path) -> None:
    installed(tmp_path)
    server = tmp_path / "server"
    stack = f'{MEMORY}frontend = {{ port = 0 }}\n{ECHO}[[workers]]\nname = "far"\ninside = true\nengine = {{ use = "elsewhere", server = "{server}" }}\n'
    with running(tmp_path, "frontend", stack) as gateway:
        gateway.until(lambda: gateway.serves() == {"echo": 2})
        gateway.until(lambda: "the server is not there" in gateway.health()["problems"].get("far-1.0 engine", ""))
        server.touch()
        gateway.until(lambda: gateway.serves() == {"echo": 2, "elsewhere": 1})
        gateway.until(lambda: gateway.health()["status"] == "healthy")
        server.unlink()
        gateway.until(lambda: "the server has gone" in gateway.health()["problems"].get("far-1.0 engine", "") or "is not there" in str(gateway.health()["problems"]))
        assert gateway.client().completions.create(model="echo", prompt="hello", max_tokens=5).choices[0].text == "hello"
        with pytest.raises(openai.InternalServerError):
            gateway.client().completions.create(model="elsewhere", prompt="hello", max_tokens=5)
        server.touch()
        gateway.until(lambda: gateway.serves() == {"echo": 2, "elsewhere": 1})
        assert gateway.client().completions.create(model="elsewhere", prompt="hello", max_tokens=5).choices[0].text == "hello"
        assert gateway.end() == 0


@pytest.mark.slow
def test_up_starts_processes_for_the_others_and_its_frontend_runs_what_is_inside(tmp_path: Path) -> None:
    stack = f'discovery = {{ use = "file", path = "{tmp_path}/discovery" }}\nfrontend = {{ port = 0 }}\n{ECHO}[[workers]]\nengine = {{ use = "echo" }}\n'
    with running(tmp_path, "up", stack, r"ready: 3 workers behind (http://[\d.:]+)") as up:
        assert up.serves() == {"echo": 3}
        started = children(up.process.pid)
        assert len(started) == 2
        assert any(" worker " in command and "--index=1" in command for command in started)
        frontend = up.health()["pid"]
        assert sum(worker["pid"] == frontend for worker in up.health()["models"]["echo"]["workers"]) == 2
        os.kill(frontend, signal.SIGKILL)
        up.until(lambda: up.text.count("listening on") == 2)
        up.url = re.findall(r"listening on (http://[\d.:]+)", up.text)[-1]
        up.until(lambda: up.serves() == {"echo": 3})
        assert up.end() == 0
    left = [file.read_bytes() for file in (tmp_path / "discovery").rglob("v1%2Finstances*") if file.is_file()]
    assert all(b'"pid":%d,' % frontend in record for record in left), "only the one that was killed leaves records, until its leases run out"


@pytest.mark.slow
def test_up_says_what_a_worker_inside_waits_for(tmp_path: Path) -> None:
    installed(tmp_path)
    stack = (f'discovery = {{ use = "file", path = "{tmp_path}/discovery" }}\nfrontend = {{ port = 0 }}\n'
             f'[[workers]]\ninside = true\nengine = {{ use = "elsewhere", server = "{tmp_path}/server" }}\n')
    with running(tmp_path, "up", stack, r"0 of 1 workers (ready) \(.*the server is not there\)") as up:
        (tmp_path / "server").touch()
        up.until(lambda: "ready: 1 workers behind" in up.text)
        assert up.end() == 0


def test_the_sample_serves(tmp_path: Path) -> None:
    sample = (Path(__file__).parents[2] / "samples/one-process.toml").read_text()
    with running(tmp_path, "frontend", sample.replace("port = 8000", "port = 0")) as gateway:
        gateway.until(lambda: gateway.serves() == {"echo": 2})
        answer = gateway.client().chat.completions.with_raw_response.create(model="echo", messages=[{"role": "user", "content": "hello"}], max_tokens=10)
        assert answer.parse().choices[0].message.content == "user\nhello"
        decision = httpx.get(f"{gateway.url}/debug/decisions/{answer.headers['x-dynamo-decision']}").json()
        assert len(re.findall(r"backend-\w+", decision["text"])) >= 2, decision["text"]
        assert gateway.end() == 0


def said(folder: Path, *words: str, stack: str) -> tuple[int, str]:
    """What a command answers at once."""
    path = folder / "stack.toml"
    path.write_text(stack)
    role, *more = words
    done = subprocess.run([sys.executable, "-m", "dynamo_core.cli", role, str(path), *more], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


ABSENT = '[[workers]]\nengine = { use = "not-installed-here" }\n'


def test_a_frontend_checks_the_options_of_what_it_runs_itself(tmp_path: Path) -> None:
    code, text = said(tmp_path, "frontend", stack=f'{MEMORY}{ABSENT}[[workers]]\ninside = true\nengine = {{ use = "echo", dela = 1 }}\n')
    assert code == 2
    assert "did you mean 'delay'?" in text
    assert "not-installed-here" not in text, "others run it"
    assert "listening" not in text


def test_several_frontend_processes_cannot_all_run_the_same_worker(tmp_path: Path) -> None:
    code, text = said(tmp_path, "check", stack=f"[frontend]\nprocesses = 2\n{ECHO}")
    assert code == 2
    assert "frontend.processes is 2, and each of them would run workers[0]" in text
    assert said(tmp_path, "check", stack=f"[frontend]\nprocesses = 2\n{ECHO}".replace("count = 2", "count = 0"))[0] == 0


def test_check_knows_a_stack_that_is_one_process(tmp_path: Path) -> None:
    code, text = said(tmp_path, "check", stack=MEMORY + ECHO)
    assert (code, "warning" in text) == (0, False)
    assert "2 x backend (echo) inside the process that routes" in text
    code, text = said(tmp_path, "check", stack=f"{MEMORY}{ECHO}[[workers]]\n")
    assert "discovery 'memory' stays inside one process" in text


def test_a_worker_process_is_for_what_is_not_inside(tmp_path: Path) -> None:
    code, text = said(tmp_path, "worker", stack=ABSENT.replace("[[workers]]", "[[workers]]\ninside = true") + ABSENT.replace("here", "there"))
    assert (code, "engine 'not-installed-there'" in text, "not-installed-here" in text) == (2, True, False)
    code, text = said(tmp_path, "worker", "--index", "0", stack=ECHO)
    assert (code, "--set workers.0.inside=false" in text) == (2, True)
    code, text = said(tmp_path, "worker", stack=ECHO)
    assert (code, "every [[workers]] table of the file is inside" in text) == (2, True)
    code, text = said(tmp_path, "up", stack=MEMORY + ECHO)
    assert (code, "`dynamo frontend` is the whole stack" in text) == (2, True)
