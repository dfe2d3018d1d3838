"""The choices of a stack, each as real processes: HTTP servers, TLS, several frontend processes, request and event planes."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest
import zmq

from dynamo_core.testing.servers import Authority

WORKERS = '[[workers]]\ncount = 2\nengine = { use = "echo" }\n'


class Fleet(Authority):
    """With a certificate for a server and one for a client."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.server, self.client = self.issue("server"), self.issue("client")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return Fleet(tmp_path_factory.mktemp("authority"))


def check(client: httpx.Client) -> None:
    """Whole, streamed, and refused."""
    body = {"model": "echo", "prompt": "abc", "max_tokens": 6}
    assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == "abcabc"
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    refused = client.post("/v1/completions", json=body | {"temprature": 1})
    assert refused.status_code == 400
    assert "temprature" in refused.json()["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("server", ["hypercorn", "uvicorn"])
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_each_server_with_two_processes(up, fleet: Fleet, server: str, secure: bool) -> None:
    tls = f'tls = {{ cert = "{fleet.server[0]}", key = "{fleet.server[1]}" }}\n' if secure else ""
    stack = up(f'[frontend]\nport = 0\nprocesses = 2\nhttp_server = {{ use = "{server}" }}\n{tls}{WORKERS}')
    assert stack.url.startswith("https" if secure else "http:")
    trust = ssl.create_default_context(cafile=str(fleet.cert))
    pids = set()
    for _ in range(60):
        with httpx.Client(base_url=stack.url, verify=trust, timeout=30) as client:
            pids.add(client.get("/health").json()["pid"])
        if len(pids) == 2:
            break
    assert len(pids) == 2, "both processes take connections"
    with httpx.Client(base_url=stack.url, verify=trust, timeout=30, http2=True) as client:
        check(client)
        assert client.get("/live").http_version == ("HTTP/2" if secure and server == "hypercorn" else "HTTP/1.1")
    assert stack.stop() == 0
    assert stack.left_behind() == []


@pytest.mark.slow
@pytest.mark.parametrize("server", ["hypercorn", "uvicorn"])
def test_a_frontend_that_wants_client_certificates_takes_no_stranger(up, fleet: Fleet, server: str) -> None:
    stack = up(f"""
[frontend]
port = 0
http_server = {{ use = "{server}" }}
tls = {{ cert = "{fleet.server[0]}", key = "{fleet.server[1]}", client_ca = "{fleet.cert}" }}
admin = {{ port = 0 }}
{WORKERS}""")
    trust = ssl.create_default_context(cafile=str(fleet.cert))
    with pytest.raises(httpx.TransportError), httpx.Client(base_url=stack.url, verify=trust, timeout=30) as stranger:
        stranger.get("/live")
    trust.load_cert_chain(*fleet.client)
    with httpx.Client(base_url=stack.url, verify=trust, timeout=30) as client:
        check(client)


def test_client_certificates_without_an_admin_address_are_refused_with_the_remedy(fleet: Fleet, start_stack, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"add \[frontend.admin\]"):
        start_stack(tmp_path, f'[frontend]\nport = 0\ntls = {{ cert = "{fleet.server[0]}", key = "{fleet.server[1]}", client_ca = "{fleet.cert}" }}\n{WORKERS}')


@pytest.mark.slow
def test_everything_encrypted_inside_the_fleet(up, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutual TLS on the request plane and CURVE on the event plane; load events arrive, and no stranger gets in."""
    monkeypatch.setenv("CURVE_KEY", zmq.curve_keypair()[1].decode())
    cert, key = fleet.server
    stack = up(f"""
request_plane = {{ use = "tcp", tls = {{ ca = "{fleet.cert}", cert = "{cert}", key = "{key}", require_client_cert = true }} }}
event_plane = {{ use = "zmq", curve_secret_key = "env:CURVE_KEY" }}
[frontend]
port = 0
[router]
scorers = [{{ use = "load" }}]
[[workers]]
count = 2
engine = {{ use = "sim" }}
""")
    with httpx.Client(base_url=stack.url, timeout=30) as client:
        answer = client.post("/v1/completions", json={"model": "sim", "prompt": "hello there", "max_tokens": 8}).json()
        assert answer["usage"]["completion_tokens"] == 8
        assert stack.health(client)["problems"] == {}


@pytest.mark.slow
def test_the_http_request_plane_carries_a_whole_stack(up) -> None:
    stack = up(f'request_plane = {{ use = "http" }}\n[frontend]\nport = 0\n{WORKERS}')
    assert all(worker["address"].startswith("http://") for worker in stack.workers())
    with httpx.Client(base_url=stack.url, timeout=30) as client:
        check(client)


@pytest.mark.slow
@pytest.mark.parametrize("use", ['discovery = { use = "memory" }', 'request_plane = { use = "in-process" }'])
def test_planes_in_memory_are_refused_by_up_with_the_remedy(start_stack, tmp_path: Path, use: str) -> None:
    with pytest.raises(AssertionError, match='use discovery = "file" and request_plane = "tcp"'):
        start_stack(tmp_path, f"{use}\n[frontend]\nport = 0\n{WORKERS}")
