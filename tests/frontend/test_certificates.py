"""What is wrong with the files of `[frontend.tls]` is said by `dynamo check`, and by a frontend before it serves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_core.cli import main
from dynamo_core.config.schema import Tls
from dynamo_core.frontend.certificates import unusable
from dynamo_core.testing.servers import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def said(tls: Tls) -> list[str]:
    return [str(problem) for problem in unusable(tls)]


def test_good_files_are_good(authority: Authority) -> None:
    assert said(Tls(*authority.issue("a"), authority.cert)) == []


def test_every_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    found = said(Tls(tmp_path / "a.pem", tmp_path / "a.key", tmp_path / "ca.pem"))
    assert found == [f"frontend.tls.{name}: the file {tmp_path / file} cannot be read: No such file or directory"
                     for name, file in (("cert", "a.pem"), ("key", "a.key"), ("client_ca", "ca.pem"))]


def test_garbage_an_encrypted_key_and_the_key_of_another_are_told_apart(authority: Authority, tmp_path: Path) -> None:
    (cert, key), (_, other) = authority.issue("a"), authority.issue("b")
    garbage, locked = tmp_path / "garbage.pem", tmp_path / "locked.key"
    garbage.write_text("garbage")
    subprocess.run(["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", locked], check=True, capture_output=True)
    (mixed,) = said(Tls(cert, other))
    assert "the key is that of another certificate" in mixed
    (encrypted,) = said(Tls(cert, locked))
    assert "the key is encrypted" in encrypted
    no_pair, no_authority = said(Tls(garbage, key, garbage))
    assert f"{garbage} and {key} are not a certificate and its private key" in no_pair
    assert f"frontend.tls.client_ca: {garbage} holds no certificates" in no_authority


def test_check_and_the_frontend_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stack = tmp_path / "stack.toml"
    stack.write_text(f'discovery = {{ use = "file", path = "{tmp_path}/d" }}\n[frontend.tls]\ncert = "{tmp_path}/a"\nkey = "{tmp_path}/b"\n'
                     f'[request_plane]\nuse = "tcp"\ntls = {{ ca = "{tmp_path}/c" }}\n')
    assert main(["check", str(stack)]) == 2
    checked = capsys.readouterr().err
    assert f"frontend.tls.key: the file {tmp_path}/b cannot be read" in checked
    assert f"tls: {tmp_path}/c" in checked
    served = subprocess.run([sys.executable, "-m", "dynamo_core.cli", "frontend", str(stack)], capture_output=True, text=True, timeout=60)
    assert served.returncode == 2
    assert f"frontend.tls.cert: the file {tmp_path}/a cannot be read" in served.stderr
    assert "Traceback" not in served.stderr
