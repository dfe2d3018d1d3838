"""Real etcd and NATS servers for tests: started on free ports, killed, stopped in their tracks, restarted, wiped.

Use the fixtures `etcd_server` and `nats_server`. Calls block for as long as a server needs to start: where an event loop has other
work meanwhile, `await asyncio.to_thread(cluster.start)`.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

PATIENCE = 30.0
"""Seconds after which a server that does not answer has failed to start."""
_reserved: list[socket.socket] = []


def free_port() -> int:
    """A port that nobody listens on, outside the range from which outgoing connections take theirs: it stays free while a server is down.

    Other test processes stay away from it as long as this one lives: the UDP port of that number is the mark.
    """
    while True:
        port = random.randrange(15000, 32000)
        mark = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            mark.bind(("127.0.0.1", port))
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            mark.close()
            continue
        _reserved.append(mark)
        return port


def binary(name: str, package: str) -> str:
    """Where a server is. :raises RuntimeError: it is not installed; says how to."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")
    if path is None:
        raise RuntimeError(f"these tests need {name}: run `make servers`, or install the package {package} of your distribution")
    return path


class Authority:
    """Signs certificates that pass Python's strict checks (RFC 5280), made with openssl."""

    def __init__(self, folder: Path, name: str = "fleet") -> None:
        self.folder = folder / f"{name}-ca"
        self.folder.mkdir(parents=True)
        self.cert, self._key = self.folder / "ca.pem", self.folder / "ca.key"
        self._openssl("req", "-x509", *self._new_key(self._key), "-days", "2", "-subj", f"/CN={name}",
                      "-addext", "keyUsage=critical,keyCertSign,cRLSign", "-out", self.cert)

    def issue(self, name: str, valid_for: str = "IP:127.0.0.1,DNS:localhost") -> tuple[Path, Path]:
        """Certificate and key, good for servers and for clients."""
        key, request, cert, extensions = (self.folder / f"{name}.{kind}" for kind in ("key", "csr", "pem", "ext"))
        extensions.write_text(f"subjectAltName={valid_for}\nbasicConstraints=CA:FALSE\nauthorityKeyIdentifier=keyid\n")
        self._openssl("req", "-new", *self._new_key(key), "-subj", f"/CN={name}", "-out", request)
        self._openssl("x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self._key, "-CAcreateserial", "-days", "2",
                      "-extfile", extensions, "-out", cert)
        return cert, key

    @staticmethod
    def _new_key(key: Path) -> tuple[str | Path, ...]:
        return "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key

    @staticmethod
    def _openssl(*arguments: str | Path) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@attrs.frozen
class ServerTls:
    """The files of a server's TLS."""

    ca: Path
    cert: Path
    key: Path
    require_client_cert: bool = False


class Node:
    """One server process. Its data and its ports stay the same over restarts."""

    def __init__(self, command: Sequence[str], data: Path, log: Path) -> None:
        self._command = list(command)
        self._data = data
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def spawn(self) -> None:
        if not self.running:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)

    def _signal(self, number: int) -> None:
        if self._process is not None and self.running:
            self._process.send_signal(number)

    def kill(self) -> None:
        """As a crash: SIGKILL, nothing is said to anybody."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def pause(self) -> None:
        """Stand still with every connection open (SIGSTOP)."""
        self._signal(signal.SIGSTOP)
        # The signal is on its way to every thread; one of them may still answer.
        while not self._stands_still():
            time.sleep(0.001)

    def _stands_still(self) -> bool:
        assert self._process is not None
        states = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{self._process.pid}/task").glob("*/stat")]
        return all(state == "T" for state in states)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def reload(self) -> None:
        """SIGHUP."""
        self._signal(signal.SIGHUP)

    def wipe(self) -> None:
        """Forget everything. Only while it is down."""
        assert not self.running, "wipe a server that is down"
        shutil.rmtree(self._data, ignore_errors=True)

    def said(self) -> str:
        """The end of its log."""
        return self._log.read_text(errors="replace")[-3000:] if self._log.exists() else ""


class Cluster:
    """Some nodes that form one service."""

    nodes: list[Node]

    def ready(self) -> bool:
        """Whether every node answers, and the cluster as a whole."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the nodes that are down, and wait until the service works."""
        for node in self.nodes:
            node.spawn()
        end = time.monotonic() + PATIENCE
        while not self.ready():
            if time.monotonic() > end or not all(node.running for node in self.nodes):
                self.kill()
                raise RuntimeError("a server did not start; its last lines:\n" + "\n---\n".join(node.said() for node in self.nodes))
            time.sleep(0.02)

    def kill(self) -> None:
        """Kill every node, as a power failure."""
        for node in self.nodes:
            node.kill()

    def wipe(self) -> None:
        """Forget everything. Only while it is down."""
        for node in self.nodes:
            node.wipe()


class EtcdCluster(Cluster):
    """One node or several. With `password`, authentication is on, and `root` has this password."""

    def __init__(self, folder: Path, *, nodes: int = 1, tls: ServerTls | None = None, password: str | None = None, options: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True)
        self.tls = tls
        self._scheme = "https" if tls else "http"
        clients, peers = ([free_port() for _ in range(nodes)] for _ in range(2))
        self.endpoints = [f"{self._scheme}://127.0.0.1:{port}" for port in clients]
        together = ",".join(f"n{i}=http://127.0.0.1:{port}" for i, port in enumerate(peers))
        secure = ["--cert-file", str(tls.cert), "--key-file", str(tls.key)] if tls else []
        if tls and tls.require_client_cert:
            secure += ["--client-cert-auth", "--trusted-ca-file", str(tls.ca)]
        self.nodes = [
            Node([binary("etcd", "etcd-server"), "--name", f"n{i}", "--data-dir", str(folder / f"n{i}"), "--log-level", "warn",
                  "--initial-cluster", together, "--initial-cluster-state", "new", "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
                  "--listen-client-urls", endpoint, "--advertise-client-urls", endpoint, "--listen-peer-urls", f"http://127.0.0.1:{peer}",
                  *secure, *options], folder / f"n{i}", folder / f"n{i}.log")
            for i, (endpoint, peer) in enumerate(zip(self.endpoints, peers, strict=True))
        ]
        self._password = password
        self.start()
        if password is not None:
            self._protect(password)

    def ready(self) -> bool:
        for endpoint in self.endpoints:
            try:
                with urllib.request.urlopen(f"{endpoint}/health", timeout=1, context=self._context()) as answer:
                    if json.load(answer).get("health") != "true":
                        return False
            except (OSError, ValueError):
                return False
        return True

    def call(self, path: str, body: dict[str, Any], *, token: str | None = None, node: int = 0) -> dict[str, Any]:
        """One request to the JSON gateway, as an administrator would."""
        request = urllib.request.Request(f"{self.endpoints[node]}/v3/{path}", json.dumps(body).encode(), {"Authorization": token} if token else {})
        with urllib.request.urlopen(request, timeout=10, context=self._context()) as answer:
            return json.load(answer)

    def leader(self) -> int:
        """The index of the node that leads."""
        for i in range(len(self.nodes)):
            with contextlib.suppress(urllib.error.URLError, OSError):
                status = self.call("maintenance/status", {}, node=i)
                if status.get("leader") == status["header"]["member_id"]:
                    return i
        raise RuntimeError("etcd has no leader now")

    def add_user(self, name: str, password: str, prefix: str) -> None:
        """A user who may read and write keys with this prefix and nothing else."""
        token = self._root()
        self.call("auth/user/add", {"name": name, "password": password}, token=token)
        self.call("auth/role/add", {"name": name}, token=token)
        key, end = prefix.encode(), prefix[:-1].encode() + bytes([ord(prefix[-1]) + 1])
        permission = {"permType": "READWRITE", "key": b64encode(key).decode(), "range_end": b64encode(end).decode()}
        self.call("auth/role/grant", {"name": name, "perm": permission}, token=token)
        self.call("auth/user/grant", {"user": name, "role": name}, token=token)

    def _root(self) -> str:
        return self.call("auth/authenticate", {"name": "root", "password": self._password})["token"]

    def _protect(self, password: str) -> None:
        self.call("auth/user/add", {"name": "root", "password": password})
        self.call("auth/role/add", {"name": "root"})
        self.call("auth/user/grant", {"user": "root", "role": "root"})
        self.call("auth/enable", {})

    def _context(self) -> Any:
        if self.tls is None:
            return None
        import ssl

        context = ssl.create_default_context(cafile=str(self.tls.ca))
        context.load_cert_chain(self.tls.cert, self.tls.key)
        return context


class NatsCluster(Cluster):
    """One node or several, with JetStream. `more` is text for the configuration of each: `authorization { ... }`, `accounts { ... }`.

    `host`: where clients reach it; an address of another network namespace's link, say. Tools ask it at 127.0.0.1 all the same.
    """

    def __init__(self, folder: Path, *, nodes: int = 1, tls: ServerTls | None = None, more: str = "", jetstream: bool = True,
                 max_payload: int | None = None, host: str = "127.0.0.1") -> None:
        folder.mkdir(parents=True)
        clients, routes, monitors = ([free_port() for _ in range(nodes)] for _ in range(3))
        self.servers = [f"{'tls' if tls else 'nats'}://{host}:{port}" for port in clients]
        self._host = host
        self._clients = clients
        self._monitors = monitors
        self._jetstream = jetstream
        self.nodes = []
        for i in range(nodes):
            path = folder / f"n{i}.conf"
            lines = [f'server_name: "n{i}"', f'listen: "{host}:{clients[i]}"', f'http: "127.0.0.1:{monitors[i]}"', more]
            if jetstream:
                lines.append(f'jetstream {{ store_dir: "{folder / f"n{i}"}", max_memory_store: 256MB, max_file_store: 1GB }}')
            if nodes > 1:
                together = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes)
                lines.append(f'cluster {{ name: "fleet", listen: "127.0.0.1:{routes[i]}", routes: [{together}] }}')
            if tls:
                lines.append(f'tls {{ cert_file: "{tls.cert}", key_file: "{tls.key}", ca_file: "{tls.ca}", verify: {str(tls.require_client_cert).lower()} }}')
            if max_payload:
                lines.append(f"max_payload: {max_payload}")
            path.write_text("\n".join(lines) + "\n")
            self.nodes.append(Node([binary("nats-server", "nats-server"), "-c", str(path)], folder / f"n{i}", folder / f"n{i}.log"))
        self.start()

    def ready(self) -> bool:
        for port, monitor in zip(self._clients, self._monitors, strict=True):
            try:
                socket.create_connection((self._host, port), timeout=1).close()
                if len(self._ask(monitor, "routez").get("routes", ())) < len(self.nodes) - 1:
                    return False
                if self._jetstream and len(self.nodes) > 1 and not self._ask(monitor, "jsz").get("meta_cluster", {}).get("leader"):
                    return False
            except (OSError, ValueError):
                return False
        return True

    def reload(self) -> None:
        """Have every node read its configuration again, certificates included (SIGHUP)."""
        for node in self.nodes:
            node.reload()

    def certificates(self, name: str) -> list[str]:
        """Whose certificates the clients have shown whose names begin like this."""
        connected = [connection for monitor in self._monitors for connection in self._ask(monitor, "connz?auth=true&limit=1024")["connections"]]
        shown = [connection.get("tls_peer_certs") for connection in connected if connection.get("name", "").startswith(name)]
        return [certificates[0]["subject"].removeprefix("CN=") for certificates in shown if certificates]

    def home(self, name: str) -> int | None:
        """The index of the node to which the client of this name is connected."""
        for i, monitor in enumerate(self._monitors):
            with contextlib.suppress(OSError, ValueError):
                if any(connection.get("name") == name for connection in self._ask(monitor, "connz")["connections"]):
                    return i
        return None

    @staticmethod
    def _ask(monitor: int, what: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{monitor}/{what}", timeout=1) as answer:
            return json.load(answer)
