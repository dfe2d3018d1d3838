"""Who we are: a service account whose token changes, and each kind of user that a kubeconfig can have."""

from __future__ import annotations

import json
import sys
from base64 import b64encode
from pathlib import Path

import pytest

from dynamo_core.errors import ConfigError
from dynamo_kubernetes.access import find
from dynamo_kubernetes.api import Kube, Refused, Unreachable


def write(path: Path, **parts) -> Path:
    """A kubeconfig with one context; `parts` replace its pieces."""
    content = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "it", "user": "me", "namespace": "team", **parts.get("context", {})}}],
        "clusters": [{"name": "it", "cluster": {"server": "https://127.0.0.1:1", "insecure-skip-tls-verify": True, **parts.get("cluster", {})}}],
        "users": [{"name": "me", "user": parts.get("user", {"token": "t"})}],
    }
    path.write_text(json.dumps(content))
    return path


# ------------------------------------------------------------------ files alone


async def test_a_kubeconfig_says_where_and_who(tmp_path) -> None:
    credentials = find(write(tmp_path / "config"), None, None, environ={})
    assert (credentials.server, credentials.namespace) == ("https://127.0.0.1:1", "team")
    assert await credentials.headers() == {"Authorization": "Bearer t"}
    assert find(write(tmp_path / "config"), None, "other", environ={}).namespace == "other"
    named = write(tmp_path / "config", user={"username": "ann", "password": "pw"})
    assert await find(named, "here", None, environ={}).headers() == {"Authorization": "Basic " + b64encode(b"ann:pw").decode()}


async def test_of_several_files_the_first_that_has_an_entry_counts(tmp_path) -> None:
    first, second = tmp_path / "first", write(tmp_path / "second", cluster={"server": "https://10.0.0.2"})
    first.write_text(json.dumps({"users": [{"name": "me", "user": {"token": "of the first"}}]}))
    credentials = find(None, None, None, environ={"KUBECONFIG": f"{first}:{second}:{tmp_path / 'absent'}"})
    assert credentials.server == "https://10.0.0.2"
    assert await credentials.headers() == {"Authorization": "Bearer of the first"}


@pytest.mark.parametrize(("content", "complaint"), [
    ("{", "not YAML"),
    ("[]", "this is no kubeconfig"),
    ("{}", "has no context None"),
    (json.dumps({"current-context": "a", "contexts": [{"name": "b"}]}), "has no context 'a'.*it has: b"),
    (json.dumps({"current-context": "a", "contexts": [{"name": "a", "context": {"cluster": "c"}}]}), "has no cluster 'c'"),
    (json.dumps({"current-context": "a", "contexts": [{"name": "a", "context": {"cluster": "c"}}], "clusters": [{"name": "c", "cluster": {}}]}), "has no server"),
])
def test_a_kubeconfig_that_cannot_be_used_is_the_operators_mistake(tmp_path, content, complaint) -> None:
    path = tmp_path / "config"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"(?s){complaint}"):
        find(path, None, None, environ={})


def test_without_any_credentials_it_says_what_to_set(tmp_path) -> None:
    with pytest.raises(ConfigError, match="(?s)no kubeconfig .*absent.*set `kubeconfig`"):
        find(tmp_path / "absent", None, None, environ={})
    with pytest.raises(ConfigError, match="cannot be read"):
        find(write(tmp_path / "config", cluster={"certificate-authority-data": "bm90IGEgY2VydGlmaWNhdGU="}), None, None, environ={})


async def test_a_credential_plugin_is_asked_once_until_its_token_ends(tmp_path) -> None:
    script = tmp_path / "plugin.py"
    script.write_text("""
import json, os, sys
from pathlib import Path
calls = Path(sys.argv[1]); calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
assert json.loads(os.environ["KUBERNETES_EXEC_INFO"])["kind"] == "ExecCredential"
print(json.dumps({"kind": "ExecCredential", "status": {"token": os.environ["TOKEN"] + str(len(calls.read_text())), "expirationTimestamp": sys.argv[2]}}))
""")
    calls = tmp_path / "calls"
    for end, expected in (("2099-01-01T00:00:00Z", ["Bearer t1", "Bearer t1"]), ("2020-01-01T00:00:00Z", ["Bearer t2", "Bearer t3"])):
        user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": sys.executable, "args": [str(script), str(calls), end],
                         "env": [{"name": "TOKEN", "value": "t"}]}}
        credentials = find(write(tmp_path / "config", user=user), None, None, environ={})
        assert [(await credentials.headers())["Authorization"] for _ in range(2)] == expected
    broken = find(write(tmp_path / "config", user={"exec": {"command": sys.executable, "args": ["-c", "raise SystemExit('log in first')"]}}), None, None, environ={})
    async with Kube(broken, 5.0) as kube:
        with pytest.raises(Unreachable, match="ended with 1: log in first"):
            await kube.call("GET", "/api")


async def test_a_token_file_that_was_renewed_is_read_when_the_server_asks_for_it(tmp_path) -> None:
    token = tmp_path / "token"
    token.write_text("old\n")
    credentials = find(write(tmp_path / "config", user={"tokenFile": "token"}), None, None, environ={})
    assert await credentials.headers() == {"Authorization": "Bearer old"}
    token.write_text("new\n")
    assert await credentials.headers() == {"Authorization": "Bearer old"}, "a file is not read for each request"
    assert credentials.renew()
    assert await credentials.headers() == {"Authorization": "Bearer new"}


# ------------------------------------------------------------------ at a real server


@pytest.mark.slow
class TestAtTheServer:
    async def test_a_client_certificate_in_files_or_in_the_file_itself(self, api_server, authority, kube) -> None:
        cert, key = authority.issue("somebody")
        data = {"client-certificate-data": b64encode(cert.read_bytes()).decode(), "client-key-data": b64encode(key.read_bytes()).decode()}
        for user in ({"client-certificate": str(cert), "client-key": str(key)}, data):
            async with Kube(find(api_server.kubeconfig(user=user), None, None), 5.0) as somebody:
                with pytest.raises(Refused, match='User "somebody" cannot'):
                    await somebody.call("GET", "/api/v1/namespaces")

    async def test_a_server_that_another_ca_signed_is_not_believed(self, api_server, kube, tmp_path) -> None:
        user = write(tmp_path / "config", cluster={"server": api_server.url, "insecure-skip-tls-verify": False})
        async with Kube(find(user, None, None), 5.0) as stranger:
            with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
                await stranger.call("GET", "/version")

    async def test_a_service_account_goes_on_when_its_token_was_renewed(self, api_server, kube, tmp_path) -> None:
        await kube.call("POST", kube.path("v1", "serviceaccounts"), {"metadata": {"name": "pod"}})
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": [], "expirationSeconds": 3600}}
        fresh = (await kube.call("POST", kube.path("v1", "serviceaccounts", "pod", "token"), body))["status"]["token"]
        for name, content in (("token", "expired"), ("namespace", kube.namespace), ("ca.crt", api_server.ca.read_text())):
            (tmp_path / name).write_text(content)
        environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(api_server.port)}
        credentials = find(None, None, None, environ=environ, service_account=tmp_path)
        assert credentials.namespace == kube.namespace
        async with Kube(credentials, 5.0) as pod:
            with pytest.raises(Refused, match="Unauthorized"):
                await pod.call("GET", "/version")
            (tmp_path / "token").write_text(fresh)
            with pytest.raises(Refused, match="system:serviceaccount"):  # known, and with no rights yet
                await pod.call("GET", pod.path("v1", "pods"))
