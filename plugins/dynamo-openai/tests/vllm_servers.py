"""Two real `vllm serve` of one tiny model, for the tests of a session."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import httpx

from dynamo_core.testing.servers import free_port

PATIENCE = 240.0
BLOCK = 32
_OPTIONS = {"served-model-name": "tiny", "host": "127.0.0.1", "max-model-len": 512, "max-num-seqs": 16, "kv-cache-memory-bytes": 64 << 20, "block-size": BLOCK,
            "dtype": "float32", "distributed-executor-backend": "uni", "uvicorn-log-level": "warning", "scheduling-policy": "priority",
            "structured-outputs-config": '{"backend": "xgrammar", "disable_any_whitespace": true}'}  # fmt: skip
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
                "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # fmt: skip


@attrs.define(eq=False)
class VllmServer:
    folder: Path
    model: Path
    number: int
    options: Sequence[str] = ()
    port: int = attrs.field(factory=free_port)
    kv: tuple[int, int] = attrs.field(factory=lambda: (free_port(), free_port()))
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Does not wait until it answers."""
        events = f'{{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:{self.kv[0]}", "replay_endpoint": "tcp://*:{self.kv[1]}"}}'
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(self.model), f"--port={self.port}", "--enforce-eager",
                   "--enable-prompt-tokens-details", f"--kv-events-config={events}", *(f"--{name}={value}" for name, value in _OPTIONS.items()), *self.options]  # fmt: skip
        environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(self.folder)}
        with (self.folder / f"vllm-{self.number}.log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=self.folder)

    def wait(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/v1/models", timeout=5).status_code == 200:
                    return
            assert time.monotonic() < deadline, f"{self.url} never answered:\n{self.log()}"
            assert self.process is not None
            assert self.process.poll() is None, f"vLLM ended:\n{self.log()}"
            time.sleep(0.1)

    def log(self) -> str:
        return "\n".join((self.folder / f"vllm-{self.number}.log").read_text(errors="replace").splitlines()[-40:])

    def kill(self) -> None:
        """The server and its engine, at once."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)


@attrs.define(eq=False)
class Servers:
    all: list[VllmServer]

    def __getitem__(self, number: int) -> VllmServer:
        return self.all[number]

    def engine(self, number: int, **options: Any) -> Any:
        """An engine that has to find out everything by itself."""
        from dynamo_openai.engine import OpenAIEngine

        return OpenAIEngine(**{"url": self.all[number].url, "poll_interval": 0.02, **options})


@contextlib.contextmanager
def two(folder: Path) -> Iterator[Servers]:
    made = [VllmServer(folder, tiny_model(folder), number) for number in range(2)]
    try:
        for server in made:
            server.start()
        for server in made:
            server.wait()
        yield Servers(made)
    finally:
        for server in made:
            server.kill()


def tiny_model(folder: Path) -> Path:
    # The command asks for the version of a distribution `vllm`; the one for CPU has another name.
    about = folder / "vllm-0.32.0.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    return _maker().make(folder / "tiny")


def adapter(folder: Path) -> Path:
    """A LoRA adapter of that model."""
    return _maker().make_adapter(folder / "adapter")


def _maker() -> Any:
    path = Path(__file__).parents[2] / "dynamo-vllm/tests/tiny_model.py"
    spec = importlib.util.spec_from_file_location("dynamo_openai_tiny_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
